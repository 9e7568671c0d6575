"""The folder that a run leaves: every file whole or absent, whenever the process ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regimewrap.errors import DataError
from regimewrap.files import write_whole
from regimewrap.report.charts import CHARTS, charts
from regimewrap.report.page import policy_yaml, render
from regimewrap.report.svg import as_file

if TYPE_CHECKING:
    from regimewrap.report.results import Arm, Experiment


def write_report(experiment: Experiment, folder: Path) -> None:
    """Write ``report.html``, its charts as SVG, ``results.json`` and ``policy.yaml`` into ``folder``, made if missing.

    ``results.json`` reads back with ``Experiment.model_validate_json``. ``policy.yaml`` holds a YAML document for each
    arm. Each file is written beside its place and then moved there, so an interruption leaves the old file or the new
    one, and reports of a run that goes on may be written again and again. A chart that the records no longer allow is
    removed.

    Raises:
        DataError: the folder cannot be made or written.
        MissingExtraError: scipy is not installed, and there are several seeds to compare.
    """
    drawn = charts(experiment)
    files = {
        "results.json": _json(experiment).encode(),
        "policy.yaml": _policies(experiment.arms).encode(),
        **{f"{name}.svg": as_file(picture).encode() for name, picture in drawn.items()},
        "report.html": render(experiment, drawn).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
        for name in CHARTS - drawn.keys():
            (folder / f"{name}.svg").unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot write the report to {folder}: {error.strerror or error}. Choose another folder."
        ) from error


def _json(experiment: Experiment) -> str:
    return json.dumps(_numbers_as_text(experiment.model_dump(mode="json")), indent=1, allow_nan=False) + "\n"


def _numbers_as_text(value: Any) -> Any:
    """Write NaN and infinities as text: JSON has no numbers for them, and pydantic reads such text back."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {key: _numbers_as_text(item) for key, item in value.items()}
        case list():
            return [_numbers_as_text(item) for item in value]
    return value


def _policies(arms: list[Arm]) -> str:
    return "---\n".join(f"# {arm.name}: {' '.join(arm.about.split())}\n{policy_yaml(arm)}" for arm in arms)
