"""What is built is what is on disk."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import regimewrap

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_listed_packages_are_the_folders_on_disk():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "regimewrap").rglob("__init__.py")}
    adapters = {
        f"regimewrap/{path.parent.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "integrations").rglob("__init__.py")
    }
    assert PROJECT["tool"]["setuptools"]["packages"] == sorted(name.replace("/", ".") for name in folders | adapters)


def test_every_folder_with_modules_is_a_package():
    for top in ("regimewrap", "integrations"):
        for module in (ROOT / top).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_the_version_is_written_in_one_place():
    assert importlib.metadata.version("regimewrap") == regimewrap.__version__
    version = re.escape(regimewrap.__version__)
    sources = [*(ROOT / "regimewrap").rglob("*.py"), *(ROOT / "integrations").rglob("*.py"), ROOT / "pyproject.toml"]
    assert [path.name for path in sources if re.search(rf"[\"']{version}[\"']", path.read_text())] == ["__init__.py"]


def test_types_ship_with_the_package():
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["regimewrap"]
    assert (ROOT / "regimewrap" / "py.typed").exists()


def test_all_is_what_the_package_exports():
    exported = {name for name, value in vars(regimewrap).items() if not name.startswith("_") and not _is_module(value)}
    assert set(regimewrap.__all__) == exported | {"__version__"}
    assert list(regimewrap.__all__) == sorted(regimewrap.__all__)


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"


def test_core_depends_on_torch_pydantic_and_pyyaml_alone_and_nothing_is_pinned_from_above():
    project = PROJECT["project"]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]]
    assert names == ["torch", "pydantic", "PyYAML"]
    everything = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert not [requirement for requirement in everything if re.search(r"<|==|~=", requirement)]


@pytest.mark.parametrize("path", ["regimewrap", "integrations", "examples", "docs", "README.md", ".ci", "tests"])
def test_nothing_names_a_path_of_the_machine_it_was_made_on(path):
    files = [ROOT / path] if (ROOT / path).is_file() else [p for p in (ROOT / path).rglob("*") if p.is_file()]
    texts = [file.read_text() for file in files if file.suffix in {".py", ".md", ".yml", ".yaml", ".toml", ".svg", ""}]
    assert not [text for text in texts if re.search(r"(?<![\w.:])/(home|work|root|tmp|Users)/\w", text)]


def test_commit_hooks_are_checks_that_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert [hook["entry"] for hook in hooks if hook["entry"] not in ci and "pytest" not in hook["entry"]] == []
