from __future__ import annotations

import pytest
from PIL import Image

from regimewrap.errors import DataError
from regimewrap.train.pictures import find_pictures, training_order


def fill(root, *names, count=2):
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(root / name / f"{number}.png")


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_train_and_a_held_out_folder_are_taken_as_they_are(tmp_path, held_out):
    fill(tmp_path, "train/cat", "train/dog", "train/eel", f"{held_out}/dog", f"{held_out}/eel")

    found = find_pictures(tmp_path)

    assert found.classes == ("cat", "dog", "eel")
    assert (len(found.train), len(found.val)) == (6, 4)
    assert [label for _, label in found.val] == [1, 1, 2, 2]


@pytest.mark.parametrize("above", ["", "train/"])
def test_without_one_a_picture_in_five_of_each_class_is_held_out_the_same_every_time(tmp_path, above):
    fill(tmp_path, f"{above}cat", f"{above}dog", count=15)

    found, again = find_pictures(tmp_path), find_pictures(tmp_path)

    assert [label for _, label in found.val] == [0, 0, 0, 1, 1, 1]
    assert len(found.train) == 24
    assert not set(found.train) & set(found.val)
    assert found == again


def test_a_picture_more_leaves_most_others_in_their_part(tmp_path):
    fill(tmp_path, "cat", "dog", count=20)
    before = set(find_pictures(tmp_path).val)
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "new.png")

    assert len(before - set(find_pictures(tmp_path).val)) <= 1


def test_the_only_picture_of_a_class_is_trained_on(tmp_path):
    fill(tmp_path, "cat", count=5)
    fill(tmp_path, "dog", count=1)

    found = find_pictures(tmp_path)

    assert [label for _, label in found.val] == [0]


def test_pictures_lie_at_any_depth_and_hidden_files_do_not_count(tmp_path):
    fill(tmp_path, "cat/far/below", "dog", ".ipynb_checkpoints", "__MACOSX")
    (tmp_path / "dog" / "._1.png").write_text("what macOS adds")

    assert find_pictures(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ((), "has no folder for each class"),
        (("cat",), "has one class, cat"),
        (("val/cat", "val/dog"), "has val/ but no train/"),
        (("train/cat", "train/dog", "val/eel"), "class eel is in val/ but not in train/"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(tmp_path, folders, message):
    fill(tmp_path, *folders)
    with pytest.raises(DataError, match=message):
        find_pictures(tmp_path)


def test_what_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere has no folder for each class"):
        find_pictures(tmp_path / "nowhere")
    fill(tmp_path, "cat", "dog")
    (tmp_path / "eel").mkdir()
    with pytest.raises(DataError, match=r"eel holds no picture; expected files that end in \.jpg"):
        find_pictures(tmp_path)
    (tmp_path / "eel" / "1.png").write_text("no picture")
    with pytest.raises(DataError, match=r"eel/1\.png is not a picture"):
        find_pictures(tmp_path)


def test_the_order_from_any_update_on_is_the_end_of_the_whole_order():
    whole = list(training_order(10, 3, epochs=3, seed=4))

    assert len(whole) == 9
    assert all(list(training_order(10, 3, 3, 4, first)) == whole[first:] for first in range(10))
    assert {place for batch in whole for place in batch} <= {(epoch, n) for epoch in range(3) for n in range(10)}
    assert len({place for batch in whole for place in batch}) == 27
    assert list(training_order(10, 3, 3, seed=5)) != whole


def test_fewer_pictures_than_a_batch_are_one_batch():
    assert [len(batch) for batch in training_order(4, 64, epochs=2, seed=0)] == [4, 4]
