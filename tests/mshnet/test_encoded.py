"""What a service is sent: read as it was meant, named where it cannot be. More: tests/pipelines/test_serving.py."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from mshnet.encoded import Limits, Pictures, Row, encode, read_rows, run_lengths
from mshnet.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
MASK = np.zeros((30, 20), dtype=bool)
MASK[4:20, 3:9] = True
AS_PNG, AS_LENGTHS = encode(MASK.astype(np.uint8)), json.loads(run_lengths(MASK))


def row(supports: Sequence[Any] = (encode(PIXELS),), masks: Sequence[Any] = (AS_PNG,), **limits: int) -> Row:
    (found,) = read_rows([(encode(PIXELS), json.dumps(supports), json.dumps(masks))], Limits(**limits))
    return found


def test_pictures_and_masks_come_out_as_they_went_in() -> None:
    pictures = Pictures(row([encode(PIXELS)] * 2, [AS_PNG, AS_LENGTHS]), Limits())
    np.testing.assert_array_equal(pictures.query(), PIXELS)
    for image, mask in pictures.examples():
        np.testing.assert_array_equal(image, PIXELS)
        np.testing.assert_array_equal(mask, MASK)
    np.testing.assert_array_equal(coco.decode(AS_LENGTHS), MASK)


def test_a_picture_is_turned_upright() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    Image.fromarray(np.rot90(PIXELS)).save(file, format="PNG", exif=exif)
    sent = row([base64.b64encode(file.getvalue()).decode()])
    ((image, mask),) = Pictures(sent, Limits()).examples()
    np.testing.assert_array_equal(image, PIXELS)
    np.testing.assert_array_equal(mask, MASK)


def test_examples_are_known_by_their_contents() -> None:
    other = encode(255 - PIXELS)
    names = [
        row().examples,
        row([other]).examples,
        row(masks=[AS_LENGTHS]).examples,
        row([encode(PIXELS), other], [AS_PNG] * 2).examples,
        row([other, encode(PIXELS)], [AS_PNG] * 2).examples,
    ]
    assert len(set(names)) == len(names)
    assert row().examples == names[0]
    shuffled = {key: AS_LENGTHS[key] for key in reversed(AS_LENGTHS)}
    assert row(masks=[shuffled]).examples == names[2]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_supports": 1}, "row 0: expected 1 supports at most, got 2"),
        ({"max_image_bytes": 90}, r"row 0, query: expected 90 bytes at most, got [\d,]+; send it smaller"),
        ({"max_image_pixels": 599}, "row 0, query: expected 599 pixels at most, got 20×30; send it smaller"),
        ({"max_row_pixels": 2999}, "row 0: expected 2,999 pixels at most in all its pictures together"),
    ],
)
def test_a_limit_is_named_where_it_is_exceeded(limits: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(row([encode(PIXELS)] * 2, [AS_PNG] * 2, **limits), Limits(**limits))


def test_what_is_just_within_the_limits_is_taken() -> None:
    limits = {"max_supports": 2, "max_image_pixels": 600, "max_row_pixels": 3000}
    read(row([encode(PIXELS)] * 2, [AS_PNG] * 2, **limits), Limits(**limits))


def read(sent: Row, limits: Limits) -> None:
    pictures = Pictures(sent, limits)
    pictures.query()
    pictures.examples()


def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSHNET_SERVE_MAX_ROWS", "3")
    monkeypatch.setenv("MSHNET_SERVE_KEPT_BYTES", "2_000_000_000")
    assert Limits.from_environment() == Limits(max_rows=3, kept_bytes=2_000_000_000)
    for wrong in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("MSHNET_SERVE_MAX_ROWS", wrong)
        with pytest.raises(InputError, match=f"1 or more in MSHNET_SERVE_MAX_ROWS, got '{wrong}'"):
            Limits.from_environment()
