"""With an adapter attached and the policy ``dense``, losses and weights are those of a run without regimewrap."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import processes
import pytest

processes.preload("accelerate", "lightning.pytorch")
LOOPS = Path(__file__).parent / "loops"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loop", ["plain", "accelerate", "lightning"])
def test_dense_is_bit_equal_to_no_regimewrap_at_all(loop: str, ranks: int, tmp_path: Path):
    if loop != "plain" and find_spec(loop) is None:
        pytest.skip(f"{loop} is not installed")
    script = LOOPS / f"{loop}_run.py"

    for name in ("dense", "bare"):
        (tmp_path / name).mkdir()

    dense = processes.run(script, tmp_path / "dense", "dense", ranks=ranks)
    bare = processes.run(script, tmp_path / "bare", "bare", ranks=ranks)

    for with_adapter, without in zip(dense, bare, strict=True):
        *losses, end = with_adapter.splitlines()
        *same_losses, same_end = without.splitlines()
        assert losses == same_losses
        assert len(losses) >= 100
        assert end.partition("digest")[2] == same_end.partition("digest")[2]
