from __future__ import annotations

import io
import os
import zipfile

import pytest
import torch

from regimewrap.errors import DataError
from regimewrap.recipes.study.image_files import read_images, version
from regimewrap.recipes.study.spec import Images
from regimewrap.recipes.study.tasks import load

pytest.importorskip("PIL", reason="Pillow is not installed")

TRAINING = {"steps": 1, "batch_size": 1, "lr": 0.1}


def png(level: int, side: int = 4) -> bytes:
    from PIL import Image

    kept = io.BytesIO()
    Image.new("RGB", (side, side), (level, 0, 0)).save(kept, "PNG")
    return kept.getvalue()


#: Two classes of two images; an image's red says where it lies.
FILES = {
    f"{split}/{name}/{number}.png": png(100 * (split == "test") + 10 * label + number)
    for split in ("train", "test")
    for label, name in enumerate("ab")
    for number in range(2)
}


@pytest.fixture(params=["folder", "zip"])
def write(request, tmp_path):
    def write_files(files):
        if request.param == "zip":
            path = tmp_path / "images.zip"
            with zipfile.ZipFile(path, "w") as file:
                for name, content in files.items():
                    file.writestr(name, content)
            return path
        for name, content in files.items():
            (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / name).write_bytes(content)
        return tmp_path / "images"

    return write_files


def without(part):
    return {name: content for name, content in FILES.items() if part not in name}


def test_images_come_in_the_order_of_their_names(write):
    extras = {"train/.DS_Store": b"", "train/a/.DS_Store": b"", "train/a/Thumbs.db": b"", "LICENSE": b""}
    (train, labels), (test, _) = read_images(write(FILES | extras))
    assert train.shape == (4, 3, 4, 4)
    assert train.dtype == torch.uint8
    assert train[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert test[:, 0, 3, 3].tolist() == [100, 101, 110, 111]
    assert labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (without("test/"), r"'a' is a class in train/ alone; expected a folder or a zip with train/<class>/"),
        (FILES | {"test/c/0.png": png(0)}, "'c' is a class in test/ alone"),
        (without("/b/"), "found 1 classes; .*, two classes or more"),
        ({"train/0.png": png(0), "test/0.png": png(0)}, "found 0 classes"),
        (without("test/") | {"test/a/x.txt": b"", "test/b/x.txt": b""}, "test/ holds no images in a, b"),
        (FILES | {"train/b/2.png": png(0, 5)}, "train/b/2.png has 5×5 pixels, the first image 4×4"),
        (FILES | {"train/b/2.png": b"GIF"}, "train/b/2.png cannot be read as an image"),
        (FILES | {"train/b/2.png": png(0)[:45]}, "train/b/2.png cannot be read as an image"),
        (FILES | {"train/b/more/2.png": png(0)}, "train/b/more is a folder"),
    ],
)
def test_what_is_no_tree_of_images_is_named(write, files, said):
    with pytest.raises(DataError, match=said):
        read_images(write(files))


def test_a_file_that_is_no_zip_and_a_name_that_is_nothing(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"images\.zip cannot be read: File is not a zip file"):
        read_images(tmp_path / "images.zip")
    with pytest.raises(DataError, match=r"digitz doesn't exist; name its folder with --data.* Did you mean 'digits'\?"):
        version(tmp_path / "digitz")


def test_a_kept_copy_is_taken_while_no_file_changed_and_of_that_folder_alone(write, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(FILES)
    task = Images(kind="images", data=path.name, side=2, training=TRAINING)

    def reds(folder):
        return sorted(load(task, 0, "test", folder).x[:, 0, 0, 0].tolist())

    assert reds(tmp_path) == reds(tmp_path) == [0, 1, 10, 11]
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 1
    changed = write(FILES | {"train/a/0.png": png(7)})
    os.utime(changed, ns=(0, 0))  # for clocks that are too coarse to tell
    assert reds(tmp_path) == [1, 7, 10, 11]
    (tmp_path / "elsewhere").mkdir()
    path.rename(tmp_path / "elsewhere" / path.name)
    write(FILES)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert reds(None) == [1, 7, 10, 11]
    monkeypatch.chdir(tmp_path)
    assert reds(None) == [0, 1, 10, 11]
