"""Every kind of picture comes out as the 8-bit RGB that a person sees."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from mshnet.data.picture_files import decoded, is_picture, opened, read_picture
from mshnet.data.pictures import rgb, upright
from mshnet.errors import InputError


def stored(picture: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The picture as it comes back from a file."""
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def ramp(top: int, dtype: str = "uint16") -> np.ndarray:
    return np.linspace(0, top, 64 * 64).reshape(64, 64).astype(dtype)


def grey(pixels: np.ndarray) -> np.ndarray:
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("top", "bits"), [(255, 8), (1023, 10), (4095, 12), (16383, 14), (65535, 16)])
def test_sixteen_bit_files_use_the_depth_of_their_sensor(kind: str, top: int, bits: int) -> None:
    numbers = ramp(top)
    picture = stored(Image.fromarray(numbers), kind)
    assert picture.mode.startswith("I;16")
    assert np.array_equal(grey(rgb(picture)), numbers >> (bits - 8))
    assert rgb(picture).max() == 255, "not clipped, not black"


def test_numbers_of_other_ranges_are_stretched() -> None:
    signed = ramp(3000, "int32") - 1000  # computed tomography's units
    found = grey(rgb(stored(Image.fromarray(signed), "TIFF")))
    assert (found.min(), found.max()) == (0, 255)
    assert np.abs(found - (signed + 1000) * 255 / 3000).max() <= 0.5
    wide = grey(rgb(Image.fromarray(ramp(10**6, "int32"))))
    assert (wide.min(), wide.max(), wide[32, 0]) == (0, 255, 128)


@pytest.mark.parametrize(("low", "high", "expected"), [(0, 1, (0, 255)), (0, 200, (0, 200)), (-1, 1, (0, 255))])
def test_fractions(low: float, high: float, expected: tuple[int, int]) -> None:
    found = grey(rgb(stored(Image.fromarray(np.linspace(low, high, 256).reshape(16, 16).astype("f4")), "TIFF")))
    assert (found.min(), found.max()) == expected
    assert (np.diff(found.ravel()) >= 0).all()


def test_what_is_not_a_number_is_black() -> None:
    numbers = np.array([[0.0, 0.5], [np.nan, np.inf]], dtype="f4")
    assert grey(rgb(Image.fromarray(numbers))).tolist() == [[0, 128], [0, 0]]
    flat = np.full((2, 2), -3, dtype="int32")
    assert grey(rgb(Image.fromarray(flat))).tolist() == [[0, 0], [0, 0]]


def test_transparent_places_show_paper() -> None:
    red = np.zeros((2, 2, 4), dtype=np.uint8)
    red[..., 0] = 255
    red[0, 0, 3], red[0, 1, 3] = 255, 128
    expected = [[[255, 0, 0], [255, 127, 127]], [[255, 255, 255], [255, 255, 255]]]
    assert rgb(stored(Image.fromarray(red), "PNG")).tolist() == expected
    dark = np.zeros((1, 2, 2), dtype=np.uint8)
    dark[0, 0, 1] = 255
    assert grey(rgb(stored(Image.fromarray(dark, "LA"), "PNG"))).tolist() == [[0, 255]]
    grey_with_one_clear = stored(Image.fromarray(np.array([[7, 9]], dtype=np.uint8)), "PNG", transparency=7)
    assert grey(rgb(grey_with_one_clear)).tolist() == [[255, 9]]


def test_palettes_with_and_without_transparency() -> None:
    picture = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert rgb(stored(picture, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    clear = stored(picture, "PNG", transparency=b"\xff\x00\xff")
    assert rgb(clear).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_black_and_white_and_grey() -> None:
    bits = Image.fromarray(np.array([[True, False]]))
    assert bits.mode == "1"
    assert grey(rgb(stored(bits, "PNG"))).tolist() == [[255, 0]]
    assert grey(rgb(stored(Image.fromarray(ramp(255, "uint8")), "JPEG", quality=100)))[0, 0] == 0


def test_print_colours() -> None:
    inks = np.zeros((16, 32, 4), dtype=np.uint8)
    inks[:, :16, 0] = 255  # cyan
    inks[:, 16:, 3] = 255  # black
    for kind in ("JPEG", "TIFF"):
        picture = stored(Image.fromarray(inks, "CMYK"), kind)
        assert picture.mode == "CMYK"
        found = rgb(picture).astype(int)
        assert np.abs(found[:, 2:14] - [0, 255, 255]).max() < 12, kind
        assert found[:, 18:30].max() < 12, kind


def test_lab_and_ycbcr() -> None:
    colours = np.full((4, 4, 3), (200, 60, 30), dtype=np.uint8)
    lab = ImageCms.applyTransform(
        Image.fromarray(colours),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert lab is not None
    for picture in (Image.fromarray(colours).convert("YCbCr"), stored(lab, "TIFF")):
        assert np.abs(rgb(picture).astype(int) - colours).max() < 12, picture.mode


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(orientation: int, tmp_path: Path) -> None:
    seen = np.zeros((8, 16, 3), dtype=np.uint8)
    seen[:4, :8] = 255  # the corner at the top left, as a viewer shows it
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that store it so
    picture = Image.fromarray(seen)
    if orientation > 1:
        picture = picture.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png"), seen)
    assert np.array_equal(rgb(upright(opened(tmp_path / "a.png"))), seen)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.jpg"
    file.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"cannot read '.*broken.jpg' as a picture \(10 bytes\): of no known format"):
        read_picture(file)
    with pytest.raises(InputError, match="no file"):
        read_picture(tmp_path / "absent.jpg")
    with pytest.raises(InputError, match="expected a file to read"):
        read_picture(tmp_path)
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    with pytest.raises(InputError, match=r"'cut\.png'"):
        decoded(whole.getvalue()[:-900], "cut.png")


def test_which_names_are_pictures() -> None:
    names = ["a.JPG", "ü/b c.jpeg", "x.tiff", "y.webp", "notes.txt", ".hidden.png", "jpg", "mask.json"]
    assert [name for name in names if is_picture(name)] == names[:4]
