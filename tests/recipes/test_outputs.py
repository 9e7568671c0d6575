from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from regimewrap.errors import DataError
from regimewrap.recipes.outputs import claimed_folder, save_weights
from regimewrap.wrap import wrap


def test_a_folder_that_was_made_and_used_stays(tmp_path):
    with claimed_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")

    assert (tmp_path / "a" / "b" / "file").exists()


def test_folders_that_were_made_and_left_empty_go(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed_folder(tmp_path / "a" / "b"):
        raise ZeroDivisionError

    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_that_was_there_stays(tmp_path):
    with claimed_folder(tmp_path):
        pass

    assert tmp_path.exists()


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_way_is_named(tmp_path, name):
    (tmp_path / "file").write_text("x")

    with pytest.raises(DataError, match=f"cannot write to .*{name}.*with --out"), claimed_folder(tmp_path / name):
        pytest.fail("entered")


def test_a_folder_that_takes_no_files_is_refused():
    with (
        pytest.raises(DataError, match="cannot write to /proc/nowhere"),
        claimed_folder(Path("/proc/nowhere")),
    ):
        pytest.fail("entered")


def test_weights_load_into_a_model_that_was_never_wrapped(tmp_path):
    model = wrap(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))

    save_weights(model, tmp_path / "model.pt")

    bare = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    bare.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert torch.equal(bare[0].weight, model[0].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_weights_that_cannot_be_written_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot write .*model\.pt"):
        save_weights(nn.Linear(1, 1), tmp_path / "nowhere" / "model.pt")
