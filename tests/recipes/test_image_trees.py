from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from regimewrap.errors import DataError
from regimewrap.recipes import images
from regimewrap.recipes.data import load_data

if TYPE_CHECKING:
    from pathlib import Path


def save_image(path: Path, value: int = 100, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for split, count in (("train", 5), ("test", 2)):
        for number, label in enumerate(("cat", "dog")):
            for index in range(count):
                save_image(root / split / label / f"{index}.png", 20 * index + 101 * number)
    return root


def zipped(root: Path, prefix: str = "") -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def test_a_folder_with_train_and_test_gives_its_own_split(tree):
    data = load_data(tree)

    assert data.classes == ("cat", "dog")
    assert data.train.pixels.shape == (10, 3, 4, 4)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    assert data.train.pixels[6, 0, 0, 0] == 121
    assert len(data.test) == 4
    assert "split into its train/ and test/" in data.about


def test_val_serves_as_test(tree):
    (tree / "test").rename(tree / "val")

    assert len(load_data(tree).test) == 4


def test_a_zip_gives_what_its_folder_gives(tree):
    from_folder, from_zip = load_data(tree), load_data(zipped(tree))

    assert torch.equal(from_folder.train.pixels, from_zip.train.pixels)
    assert torch.equal(from_folder.test.labels, from_zip.test.labels)


def test_one_folder_around_everything_and_what_systems_add_are_ignored(tree):
    (tree / "train" / ".DS_Store").write_text("x")
    save_image(tree / "__MACOSX" / "train" / "ghost" / "1.png")
    save_image(tree / "train" / "cat" / "._0.png")

    data = load_data(zipped(tree, prefix="release/images/"))

    assert data.classes == ("cat", "dog")
    assert len(data.train) == 10


def test_a_plain_folder_of_classes_holds_out_one_image_in_five_of_each(tmp_path):
    for label in ("cat", "dog"):
        for index in range(10):
            save_image(tmp_path / label / f"{index}.png", index)

    data, again = load_data(tmp_path, seed=0), load_data(tmp_path, seed=9)

    assert data.train.labels.bincount().tolist() == [8, 8]
    assert data.test.labels.bincount().tolist() == [2, 2]
    assert torch.equal(data.test.pixels, again.test.pixels)
    seen = torch.cat([data.train.pixels, data.test.pixels])[:, 0, 0, 0]
    assert seen.bincount().tolist() == [2] * 10
    assert "one image in five of each class" in data.about


def test_a_class_may_be_called_train(tmp_path):
    for label in ("bus", "train"):
        for index in range(5):
            save_image(tmp_path / label / f"{index}.png", index)

    assert load_data(tmp_path).classes == ("bus", "train")


def test_a_link_back_to_the_root_is_not_followed_for_ever(tree):
    (tree / "train" / "cat" / "loop").symlink_to(tree)

    assert len(load_data(tree).train) == 10


def test_a_class_folder_may_be_a_link(tree, tmp_path):
    (tree / "train" / "cat").rename(tmp_path / "cats")
    (tree / "train" / "cat").symlink_to(tmp_path / "cats")

    assert len(load_data(tree).train) == 10


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_other_kinds_of_image_among_rgb_ones_become_rgb(tree, mode):
    save_image(tree / "train" / "cat" / "0.png", 255, mode=mode)

    assert load_data(tree).train.pixels[0].unique().tolist() == [255]


def test_a_limit_reads_only_the_images_it_keeps(tree):
    kept = set(load_data(tree, limit=4, seed=3).train.pixels[:, 0, 0, 0].tolist())
    for number, label in enumerate(("cat", "dog")):
        for index in range(5):
            if 20 * index + 101 * number not in kept:
                (tree / "train" / label / f"{index}.png").write_bytes(b"damaged")

    assert load_data(tree, limit=4, seed=3).train.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="is damaged"):
        load_data(tree)


def test_progress_counts_every_image_read(tree):
    seen = []

    load_data(tree, limit=4, test_limit=2, on_progress=lambda done, total: seen.append((done, total)))

    assert seen == [(index, 6) for index in range(1, 7)]


def test_a_damaged_image_in_a_folder_is_named(tree):
    (tree / "train" / "dog" / "3.png").write_bytes(b"not an image")

    with pytest.raises(DataError, match=r"image train/dog/3\.png is damaged: it is not an image"):
        load_data(tree)


def test_a_truncated_image_is_named(tree):
    path = tree / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:-25])

    with pytest.raises(DataError, match=r"image test/dog/1\.png is damaged"):
        load_data(tree)


def test_a_damaged_image_in_a_zip_is_named(tree):
    (tree / "train" / "dog" / "3.png").write_bytes(b"")

    with pytest.raises(DataError, match=r"image train/dog/3\.png is damaged"):
        load_data(zipped(tree))


def test_a_zip_member_whose_checksum_is_wrong_is_named(tree):
    path = zipped(tree)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("train/dog/3.png").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 60] ^= 0xFF
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"image train/dog/3\.png in .*tree\.zip cannot be read"):
        load_data(path)


def test_a_truncated_zip_is_refused(tree):
    path = zipped(tree)
    path.write_bytes(path.read_bytes()[:-200])

    with pytest.raises(DataError, match="is not a zip archive, or is damaged"):
        load_data(path)


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    path = tmp_path / "images.tar"
    path.write_text("tar")

    with pytest.raises(DataError, match=r"images\.tar is not a zip archive"):
        load_data(path)


def test_a_path_that_does_not_exist_is_refused_with_the_nearest_name():
    with pytest.raises(DataError, match=r"data digts doesn't exist.*Did you mean digits\?"):
        load_data("digts")


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "/dev/null"])
def test_a_path_that_can_hold_no_images_is_refused(path):
    with pytest.raises(DataError, match=r"doesn't exist|neither a folder nor a zip"):
        load_data(path)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")

    with pytest.raises(DataError, match="holds no images; expected files such as"):
        load_data(tmp_path)


def test_images_outside_class_folders_alone_are_refused(tmp_path):
    save_image(tmp_path / "1.png")

    with pytest.raises(DataError, match=r"no folder for each class: 1\.png is in none"):
        load_data(tmp_path)


def test_one_class_is_refused(tmp_path):
    for index in range(5):
        save_image(tmp_path / "cat" / f"{index}.png")

    with pytest.raises(DataError, match="has one class, cat; expected at least two"):
        load_data(tmp_path)


def test_a_class_only_in_test_is_named(tree):
    save_image(tree / "test" / "emu" / "0.png")

    with pytest.raises(DataError, match="class emu is among the test images but not among the training images"):
        load_data(tree)


def test_a_test_folder_without_a_training_folder_is_refused(tree):
    (tree / "train").rename(tree / "test" / "cat" / "more")

    with pytest.raises(DataError, match="has test/ but no train/"):
        load_data(tree)


def test_images_of_two_sizes_are_refused_with_both_named(tree):
    save_image(tree / "train" / "dog" / "2.png", size=(5, 4))

    with pytest.raises(DataError, match=r"train/cat/0\.png is 4×4 but train/dog/2\.png is 5×4"):
        load_data(tree)


def test_images_of_16_bits_are_refused(tree):
    Image.new("I;16", (4, 4)).save(tree / "train" / "cat" / "0.png")

    with pytest.raises(DataError, match=r"train/cat/0\.png has more than 8 bits a channel"):
        load_data(tree)


def test_more_images_than_fit_in_memory_are_refused_before_they_are_read(tree, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXEL_BYTES", 500)

    with pytest.raises(DataError, match=r"14 images of 4×4 pixels need .* Set a limit"):
        load_data(tree)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(DataError, match=f"limit must be at least 1; got {limit}"):
        load_data("digits", limit=limit)


def test_a_limit_that_would_lose_a_class_is_refused():
    with pytest.raises(DataError, match="limit must be at least 10, so that each class is seen; got 9"):
        load_data("digits", limit=9)
