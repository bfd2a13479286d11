"""What was drawn, as a mask: each rule on drawings whose mask is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mshnet.errors import InputError
from mshnet.strokes import READINGS, mask_from_strokes

SIZE = (100, 140)


def drawn(*lines: list[tuple[int, int]], width: int = 3) -> np.ndarray:
    """Strokes through points (x, y)."""
    canvas = Image.new("1", SIZE[::-1])
    for line in lines:
        ImageDraw.Draw(canvas).line(line, fill=1, width=width)
    return np.array(canvas)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


LOOP = [(30, 20), (90, 20), (90, 70), (30, 70), (30, 20)]


def test_an_outline_is_filled_and_paint_and_boxes_are_what_they_say() -> None:
    strokes = drawn(LOOP)
    assert iou(mask_from_strokes(strokes, "outline"), rectangle(29, 19, 91, 71)) > 0.99
    np.testing.assert_array_equal(mask_from_strokes(strokes, "paint"), strokes)
    two = drawn([(10, 10), (40, 30)], [(80, 90), (100, 60)])
    ys, xs = np.nonzero(two)
    left, right = xs < 60, xs >= 60
    expected = rectangle(xs[left].min(), ys[left].min(), xs[left].max(), ys[left].max())
    expected |= rectangle(xs[right].min(), ys[right].min(), xs[right].max(), ys[right].max())
    np.testing.assert_array_equal(mask_from_strokes(two, "box"), expected)


def test_a_small_gap_counts_as_closed_and_a_large_one_does_not() -> None:
    almost = drawn([*LOOP[:4], (30, 24)], width=1)  # 2 % of 140 px: 2.8
    assert iou(mask_from_strokes(almost, "outline"), rectangle(30, 20, 90, 70)) > 0.95
    opened = drawn([*LOOP[:4], (30, 45)], width=1)
    np.testing.assert_array_equal(mask_from_strokes(opened, "outline"), opened)


@pytest.mark.parametrize("end", [0, 1])
def test_an_outline_may_end_at_the_border(end: int) -> None:
    strokes = drawn([(end, 60), (50, 60), (50, 98 - end)])
    assert iou(mask_from_strokes(strokes, "outline"), rectangle(0, 59, 51, 99)) > 0.97


def test_an_outline_around_most_of_the_picture_is_not_taken_for_its_outside() -> None:
    strokes = drawn([(5, 5), (134, 5), (134, 94), (5, 94), (5, 5)])
    assert iou(mask_from_strokes(strokes, "outline"), rectangle(4, 4, 135, 95)) > 0.99


def test_all_painted_is_all() -> None:
    assert mask_from_strokes(np.ones(SIZE, dtype=bool), "outline").all()


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(
        st.lists(st.tuples(st.integers(0, SIZE[1] - 1), st.integers(0, SIZE[0] - 1)), min_size=2, max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_every_reading_keeps_what_was_painted(lines: list[list[tuple[int, int]]]) -> None:
    strokes = drawn(*lines)
    for reading in READINGS:
        mask = mask_from_strokes(strokes, reading)
        assert mask.shape == strokes.shape
        assert (mask >= strokes).all()


def test_nothing_drawn_is_refused() -> None:
    with pytest.raises(InputError, match="expected strokes on the picture, found none"):
        mask_from_strokes(np.zeros(SIZE, dtype=bool), "outline")
