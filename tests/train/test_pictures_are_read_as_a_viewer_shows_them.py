from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from regimewrap.errors import DataError
from regimewrap.train.pictures import open_picture

LEFT, RIGHT = (10, 200, 30), (240, 20, 220)


def two_halves(width=16, height=8):
    picture = Image.new("RGB", (width, height), LEFT)
    picture.paste(RIGHT, (width // 2, 0, width, height))
    return picture


@pytest.mark.parametrize(
    ("orientation", "size", "corner"), [(1, (16, 8), LEFT), (3, (16, 8), RIGHT), (6, (8, 16), LEFT)]
)
def test_exif_orientation_is_turned(tmp_path, orientation, size, corner):
    picture = two_halves()
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)

    opened = open_picture(tmp_path / "a.png")

    assert opened.size == size
    assert opened.getpixel((0, 0)) == corner


def test_grey_has_three_equal_channels(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (77, 77, 77)


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    Image.fromarray(np.array([[0, 32768], [65535, 257]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_picture(tmp_path / "a.png"))[..., 0].tolist() == [[0, 127], [255, 1]]


def test_what_is_transparent_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 255)).save(tmp_path / "b.webp", lossless=True)
    Image.new("P", (4, 4), 0).save(tmp_path / "c.png", transparency=0)

    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(tmp_path / "b.webp").getpixel((0, 0)) == (0, 0, 0)
    assert open_picture(tmp_path / "c.png").getpixel((0, 0)) == (255, 255, 255)


def test_palettes_webp_and_cmyk_are_rgb(tmp_path):
    two_halves().quantize(8).save(tmp_path / "a.png")
    two_halves().save(tmp_path / "b.webp", lossless=True)
    two_halves().convert("CMYK").save(tmp_path / "c.jpg")

    for name in ("a.png", "b.webp", "c.jpg"):
        opened = open_picture(tmp_path / name)
        assert opened.mode == "RGB"
        assert np.abs(np.array(opened.getpixel((0, 0))) - LEFT).max() < 12


def test_a_damaged_picture_is_named(tmp_path):
    two_halves(200, 200).save(tmp_path / "a.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("no picture")

    with pytest.raises(DataError, match=r"picture .*half\.jpg is damaged"):
        open_picture(tmp_path / "half.jpg")
    with pytest.raises(DataError, match=r"text\.jpg is not a picture"):
        open_picture(tmp_path / "text.jpg")
    with pytest.raises(DataError, match=r"none\.jpg cannot be opened: No such file"):
        open_picture(tmp_path / "none.jpg")
