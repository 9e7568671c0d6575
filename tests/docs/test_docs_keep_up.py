from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import regimewrap
from regimewrap.policy.policy import PRESETS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def _shell_commands(page: Path) -> list[str]:
    return [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)
        for line in block.splitlines()
    ]


def test_readme_holds_two_commands_the_demo_and_the_tests():
    commands = _shell_commands(ROOT / "README.md")
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install ") for command in commands)
    assert commands[0].endswith("&& .venv/bin/regimewrap demo")
    assert commands[1].endswith("&& .venv/bin/python -m pytest")


def test_ci_takes_the_same_two_commands_from_readme():
    script = (ROOT / ".ci" / "run").read_text()
    awk = next(line for line in script.splitlines() if "awk" in line)
    program = re.search(r"awk '(.*)' README.md", awk)[1]
    seen = subprocess.run(["awk", program, ROOT / "README.md"], capture_output=True, text=True, check=True).stdout
    assert seen.splitlines() == _shell_commands(ROOT / "README.md")


def test_the_reference_has_every_public_name():
    reference = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: regimewrap\.(?:[\w.]+\.)?(\w+)$", reference, re.M))
    assert set(regimewrap.__all__) - {"__version__", "RegimewrapError"} <= documented  # errors come with their room


def test_the_presets_are_explained():
    page = (DOCS / "how-to" / "set-a-policy.md").read_text()
    assert [name for name in PRESETS if f"| `{name}`" not in page] == []


@pytest.mark.parametrize("picture_or_page", ["explanation/architecture.md", "assets/architecture.svg"])
def test_every_room_is_in_the_architecture(picture_or_page: str):
    rooms = {
        path.stem for path in (ROOT / "regimewrap").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    named = set(re.findall(r"[`>](\w+)[`<]", (DOCS / picture_or_page).read_text()))
    assert {room for room in rooms if not room.startswith("_")} - named == set()


def test_every_page_is_in_the_navigation():
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]

    settings = yaml.safe_load((DOCS / "config" / "mkdocs.yml").read_text())
    assert sorted(pages(settings["nav"])) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
