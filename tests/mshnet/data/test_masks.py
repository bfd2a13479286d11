"""Masks in every form that people have, each against the same object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_code

from mshnet.data.masks import TURNS, object_mask
from mshnet.errors import InputError

HEIGHT, WIDTH = 24, 40
SQUARE = [4, 6, 20, 6, 20, 18, 4, 18]


@pytest.fixture
def expected() -> np.ndarray:
    """12 rows and 16 columns, as pycocotools fills SQUARE."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[6:18, 4:20] = True
    return mask


def coco(**changes: Any) -> dict[str, Any]:
    other = [30, 2, 36, 2, 36, 8, 30, 8]
    return {
        "images": [
            {"id": 7, "file_name": "a/x.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": "b", "file_name": "b/x.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": 9, "file_name": "y z.jpg", "height": HEIGHT, "width": WIDTH},
        ],
        "categories": [{"id": 100, "name": "scratch"}, {"id": 3, "name": "dent"}, {"id": 4, "name": "100"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 100, "segmentation": [SQUARE], "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 3, "segmentation": [other]},
            {"id": 3, "image_id": 7, "category_id": 3, "segmentation": [SQUARE]},
            {"id": 4, "image_id": "b", "category_id": 3, "segmentation": [other]},
            {"id": 5, "image_id": 9, "category_id": 100, "iscrowd": 1, "segmentation": [other]},
        ],
        **changes,
    }


def written(folder: Path, content: object) -> str:
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_arrays_tensors_and_pictures(expected: np.ndarray) -> None:
    forms = [
        expected,
        expected.astype(np.int64) * 7,
        torch.from_numpy(expected),
        torch.from_numpy(expected.astype(np.uint8) * 255),
        Image.fromarray(expected),
        Image.fromarray(expected.astype(np.uint8)),
    ]
    for form in forms:
        assert np.array_equal(object_mask(form, HEIGHT, WIDTH), expected)


def test_polygons_and_run_lengths(expected: np.ndarray) -> None:
    compressed = rle_code.encode(np.asfortranarray(expected.astype(np.uint8)))
    text = {**compressed, "counts": compressed["counts"].decode()}
    flat = expected.ravel(order="F").astype(int)
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=1 - flat[0], append=1 - flat[-1]))).tolist()
    plain = {"size": [HEIGHT, WIDTH], "counts": runs}
    for form in ([SQUARE], [np.array(SQUARE)], compressed, text, plain):
        assert np.array_equal(object_mask(form, HEIGHT, WIDTH), expected)
    both = object_mask([SQUARE, [30, 2, 36, 2, 36, 8, 30, 8]], HEIGHT, WIDTH)
    assert both.sum() == expected.sum() + 36


def test_label_pictures_from_files(tmp_path: Path, expected: np.ndarray) -> None:
    numbers = np.where(expected, np.uint8(15), np.uint8(0))
    Image.fromarray(numbers).save(tmp_path / "grey.png")
    Image.fromarray(expected).save(tmp_path / "bits.png")
    Image.fromarray(numbers.astype(np.uint16) * 300).save(tmp_path / "sixteen.png")
    Image.fromarray(np.repeat(numbers[..., None], 3, axis=2)).save(tmp_path / "rgb.png")
    opaque = np.dstack([numbers, numbers, numbers, np.full_like(numbers, 255)])
    Image.fromarray(opaque).save(tmp_path / "rgba.png")
    for name in ("grey", "bits", "sixteen", "rgb", "rgba"):
        assert np.array_equal(object_mask(tmp_path / f"{name}.png", HEIGHT, WIDTH), expected), name
    several = numbers.copy()
    several[0, 0], several[23, 39] = 3, 255
    palette = Image.fromarray(several, "P")
    palette.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
    palette.save(tmp_path / "labels#2.png")
    assert np.array_equal(object_mask(f"{tmp_path}/labels#2.png#15", HEIGHT, WIDTH), expected)
    with pytest.raises(InputError, match=r"holds? the labels 3, 15, 255|found 3, 15, 255"):
        object_mask(f"{tmp_path}/labels#2.png", HEIGHT, WIDTH)
    with pytest.raises(InputError, match=r"a whole number\) after the #.*found 'dog'"):
        object_mask(f"{tmp_path}/labels#2.png#dog", HEIGHT, WIDTH)


def test_coco_json_by_the_images_name(tmp_path: Path, expected: np.ndarray) -> None:
    file = written(tmp_path, coco())
    for choice in ("scratch",):
        found = object_mask(f"{file}#{choice}", HEIGHT, WIDTH, "/pictures/y z.jpg")
        assert np.array_equal(found, expected), "the crowd is left out"
    assert np.array_equal(object_mask(f"{file}#3", HEIGHT, WIDTH, "data/a/x.jpg"), expected), "by number"
    assert object_mask(f"{file}#dent", HEIGHT, WIDTH, "data/b/x.jpg").sum() == 36, "the folder tells which"
    with pytest.raises(InputError, match=r"one image by the name 'x.jpg' .* found 2|found none"):
        object_mask(f"{file}#dent", HEIGHT, WIDTH, "x.jpg")
    with pytest.raises(InputError, match=r"an object 'scratch' in 'a/x\.jpg' .* found none"):
        object_mask(f"{file}#scratch", HEIGHT, WIDTH, "a/x.jpg")
    with pytest.raises(InputError, match="an object '100'"):  # a name before a number
        object_mask(f"{file}#100", HEIGHT, WIDTH, "y z.jpg")
    with pytest.raises(InputError, match=r"a category of .*\(100, dent, scratch\), found ''; is .*#100 meant"):
        object_mask(file, HEIGHT, WIDTH, "y z.jpg")
    with pytest.raises(InputError, match=r"found 'scrach'; is .*#scratch meant"):
        object_mask(f"{file}#scrach", HEIGHT, WIDTH, "y z.jpg")


def test_one_category_needs_no_name_and_equal_names_are_one_class(tmp_path: Path, expected: np.ndarray) -> None:
    content = coco(categories=[{"id": 100, "name": "scratch"}])
    content["annotations"] = content["annotations"][:1]
    assert np.array_equal(object_mask(written(tmp_path, content), HEIGHT, WIDTH, "y z.jpg"), expected)
    twice = coco(categories=[{"id": 100, "name": "scratch"}, {"id": 3, "name": "scratch"}])
    found = object_mask(f"{written(tmp_path, twice)}#scratch", HEIGHT, WIDTH, "y z.jpg")
    assert found.sum() == expected.sum() + 36


def test_labelme_and_bare_polygons(tmp_path: Path, expected: np.ndarray) -> None:
    points = [[4, 6], [20, 6], [20, 18], [4, 18]]
    shapes = [{"label": "scratch", "points": points, "shape_type": "polygon"}, {"label": "eye", "points": [[1, 1]]}]
    file = written(tmp_path, {"shapes": shapes, "imageHeight": HEIGHT, "imageWidth": WIDTH})
    assert np.array_equal(object_mask(f"{file}#scratch", HEIGHT, WIDTH), expected)
    with pytest.raises(InputError, match=r"one label of .*, found eye, scratch; name it: .*#eye"):
        object_mask(file, HEIGHT, WIDTH)
    circle = written(tmp_path, {"shapes": [{"label": "x", "points": [[1, 1], [2, 2]], "shape_type": "circle"}]})
    with pytest.raises(InputError, match=r"expected polygons in .*found circle"):
        object_mask(circle, HEIGHT, WIDTH)
    assert np.array_equal(object_mask(written(tmp_path, [SQUARE]), HEIGHT, WIDTH), expected)


@pytest.mark.parametrize("orientation", sorted(TURNS))
def test_masks_of_the_size_that_the_file_stores_are_turned_with_it(
    orientation: int, tmp_path: Path, expected: np.ndarray
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(expected.astype(np.uint8) * 255).save(tmp_path / "turned.png", exif=exif)
    from PIL import ImageOps

    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))) != 0
    assert upright.shape == (WIDTH, HEIGHT)
    compressed = rle_code.encode(np.asfortranarray(expected.astype(np.uint8)))
    file = written(tmp_path, coco())
    for form in (expected, compressed, f"{file}#scratch"):
        found = object_mask(form, WIDTH, HEIGHT, "y z.jpg", orientation)
        assert np.array_equal(found, upright)
    assert np.array_equal(object_mask(upright, WIDTH, HEIGHT, "y z.jpg", orientation), upright)
    with pytest.raises(
        InputError, match=r"one size: the mask of 'y z.jpg' is 40×24 px, its image 24×40 px \(upright\)"
    ):
        object_mask(expected, WIDTH, HEIGHT, "y z.jpg")


def wrong(expected: np.ndarray) -> list[tuple[Any, str]]:
    coloured = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    coloured[0, 0] = (255, 0, 0)
    clear = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    clear[6:, :, 3] = 255
    return [
        (expected[:-1], r"is 40×23 px, its image 40×24 px"),
        (np.zeros_like(expected), "expected an object in the mask, found none"),
        (expected.astype(float), "bool or whole numbers .* found float64; give e.g. probabilities > 0.5"),
        (expected[None], r"found an array of shape \(1, 24, 40\)"),
        (Image.fromarray(coloured), "in colours"),
        (Image.fromarray(clear), "partly transparent"),
        ([[1, 2, 3, 4]], "polygon of 2 points"),
        ([[0, 0, 10, 0, 1e9, 10]], "far outside"),
        ([], "found list"),
        ({"size": [HEIGHT, WIDTH], "counts": [5]}, "run lengths that do not make up"),
        ({"size": [3, 3], "counts": [0, 9]}, r"RLE of size \[3, 3\]"),
        ({"counts": [5]}, "neither polygons nor run lengths"),
        ([["a", "b"]], "neither polygons nor run lengths"),
        (3.5, "found float"),
        ("absent.png", "no file 'absent.png'"),
        ("absent.json#dog", "no file 'absent.json'"),
    ]


@pytest.mark.parametrize("case", range(16))
def test_what_is_no_mask_of_the_image(case: int, expected: np.ndarray) -> None:
    form, message = wrong(expected)[case]
    with pytest.raises(InputError, match=message):
        object_mask(form, HEIGHT, WIDTH)


def test_a_jpeg_is_no_mask(tmp_path: Path, expected: np.ndarray) -> None:
    Image.fromarray(expected.astype(np.uint8) * 255).save(tmp_path / "mask.jpg")
    with pytest.raises(InputError, match="found JPEG, which blurs labels"):
        object_mask(tmp_path / "mask.jpg", HEIGHT, WIDTH)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        object_mask(tmp_path / "broken.json", HEIGHT, WIDTH)
    (tmp_path / "other.json").write_text('{"version": 3}')
    with pytest.raises(InputError, match="found none of them"):
        object_mask(tmp_path / "other.json", HEIGHT, WIDTH)
