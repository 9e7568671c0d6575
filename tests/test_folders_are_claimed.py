from __future__ import annotations

from pathlib import Path

import pytest

from regimewrap.errors import DataError
from regimewrap.files import claimed_folder


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
