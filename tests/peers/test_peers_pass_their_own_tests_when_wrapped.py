"""The own tests of timm, PEFT and Transformers, with every model wrapped; see docs/how-to/run-the-zoo.md.

The tests come with the source distribution of the installed version, which pip fetches into a folder for temporary
files. What fails wrapped runs again bare: only what passes then is a fault of ours.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers

HERE = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / "regimewrap-peers"


@dataclass(frozen=True)
class Peer:
    """Which of a library's tests run.

    Attributes:
        files: their files.
        needs: modules that they import beside the library.
        chosen: which tests, as pytest's ``-k`` has it.
        finite: those that hold at any budget, since they ask for finite outputs or gradients only.
        least: so many tests must pass, so that nothing is left out in silence.
    """

    files: tuple[str, ...]
    needs: tuple[str, ...]
    chosen: str
    finite: str
    least: int


PEERS = {
    # A wrapped model is not scripted, and says so.
    "timm": Peer(("test_models", "test_task"), (), "not script", "test_model_forward or test_model_backward", 150),
    "peft": Peer(
        ("test_custom_models", "test_mixed", "test_vera", "test_vblora", "test_randlora", "test_shira", "test_osf"),
        ("parameterized", "datasets", "diffusers"),
        "",
        "test_training_custom_models or test_forward_output_finite",
        250,
    ),
    # One of the 25 variants of a test that compares two ways to compute attention.
    "transformers": Peer(
        ("test_five_architectures",),
        ("parameterized",),
        "not bc_torch_dtype and (not eager_matches_sdpa or 09_fp32)",
        "test_training or test_feed_forward_chunking or test_forward_signature",
        250,
    ),
}


def fetched(name: str) -> Path:
    """Return the unpacked source distribution of the installed version."""
    version = importlib.metadata.version(name)
    folder = CACHE / f"{name}-{version}"
    if not (folder / "tests").exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name, "-d", str(CACHE)]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True)
        archive = CACHE / f"{name}-{version}.tar.gz"
        if not archive.exists():
            pytest.skip(f"pip could not fetch {archive.name}: {done.stderr.strip()[-300:]}")
        with tarfile.open(archive) as packed:
            packed.extractall(CACHE, filter="data")
        (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    if name == "transformers":
        tests = folder / "tests"
        shutil.copy(HERE / "five_architectures.py", tests / "test_five_architectures.py")
        # The distribution lacks two parents of the mixin, with tests of exports and of generation.
        for home, what in (
            ("exporters/test_export", "ExportTesterMixin"),
            ("generation/test_utils", "GenerationTesterMixin"),
        ):
            (tests / home).parent.mkdir(exist_ok=True)
            (tests / f"{home}.py").write_text(f"class {what}:\n    pass\n")
    return folder


def run(
    name: str, folder: Path, mode: str, tests: list[str], chosen: str = ""
) -> tuple[dict[str, str], dict[str, int]]:
    """Run tests of a peer; return outcomes by test, and how many models were wrapped."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.json"
        told = {"PEER": name, "WRAPPING": mode, "RESULTS": str(results), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
        command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-p", "wrapping", "-p", "no:cacheprovider", "-q"]
        done = subprocess.run(
            [*command, "-W", "ignore", "--tb=short", "-k", chosen, *tests],
            cwd=folder, env=os.environ | told, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert results.exists(), done.stdout[-3000:] + done.stderr[-3000:]
        (CACHE / f"{name}-{mode}.log").write_text(done.stdout)
        read = json.loads(results.read_text())
        return read["outcomes"], read["models"]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("mode", ["full", "moving"])
def test_what_passes_bare_passes_wrapped(name, mode, capsys):
    peer = PEERS[name]
    for each in (name, *peer.needs):
        pytest.importorskip(each, reason=f"pip install {each}")
    folder = fetched(name)
    files = [f"tests/{each}.py" for each in peer.files]
    chosen = peer.chosen if mode == "full" else " and ".join(f"({each})" for each in (peer.finite, peer.chosen) if each)
    outcomes, models = run(name, folder, mode, files, chosen)
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    bare = run(name, folder, "bare", failed)[0] if failed else {}
    ours = [test for test in failed if bare.get(test) == "passed"]
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    figures = f"{passed} passed, {len(failed)} failed, {len(ours)} of them only when wrapped, of {len(outcomes)}"
    with capsys.disabled():
        sys.stdout.write(f"\n{name}, {mode}: {figures}; models {models}\n")
    assert not ours, f"only when wrapped (see {CACHE}): {ours}"
    assert models["wrapped"]
    assert mode == "moving" or passed >= peer.least
