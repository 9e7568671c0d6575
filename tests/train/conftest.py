from __future__ import annotations

from typing import NamedTuple

import pytest
from PIL import Image, ImageDraw

from regimewrap import cli

POLICY = """
cycle: {strategy: {kind: ema-reset, tolerance: 0.5}, monitor: loss, every: 2}
"""


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Two classes of twelve pictures each, no two of one size."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    for name in ("circle", "square"):
        (root / name).mkdir(parents=True)
        for number in range(12):
            picture = Image.new("RGB", (24 + 3 * number, 50 - 2 * number), (20 * number, 90, 160))
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if name == "circle" else draw.rectangle)((4, 4, 20, 20), fill="white")
            picture.save(root / name / f"{number}.png")
    return root


@pytest.fixture
def regimewrap(capsys, tmp_path, monkeypatch):
    """Run a command line in an empty folder of its own, which has a policy that decides every other update."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(POLICY)

    def run(*arguments: object) -> Outcome:
        status = cli.run([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def train(regimewrap, shapes):
    """Run ``regimewrap train`` on the shapes: three updates an epoch of a tiny network."""
    small = ("--model", "test_resnet", "--img-size", 32, "--batch-size", 6, "--workers", 0, "--device", "cpu")

    def run(*options: object) -> Outcome:
        defaults = {"--epochs": 2, "--policy": "quick.yaml", "--out": "out"}
        given = [word for name, value in defaults.items() if name not in options for word in (name, value)]
        return regimewrap("train", shapes, *small, *given, *options)

    return run
