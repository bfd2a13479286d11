from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from mshnet.errors import InputError
from mshnet.visualize import (
    CAPTION_PX,
    GAP_PX,
    PREDICTION_RGB,
    SUPPORT_RGB,
    TILE_PX,
    TRUTH_RGB,
    class_bars,
    episode_panel,
    foreground_iou,
    learning_curves,
    overlay,
    png_bytes,
)


def square(height: int, width: int, top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def has_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((pixels == np.array(colour)).all(axis=-1).any())


def test_iou_counts_every_pixel_but_the_ignored() -> None:
    truth = np.zeros((4, 4), dtype=np.uint8)
    truth[:2] = 1  # 8 px
    truth[3, 3] = 255
    prediction = np.zeros((4, 4), dtype=bool)
    prediction[1:] = True  # 12 px, one of them ignored
    assert foreground_iou(truth, prediction) == 4 / 15
    assert foreground_iou(np.zeros((2, 2), np.uint8), np.zeros((2, 2), bool)) == 1.0
    assert foreground_iou(np.full((2, 2), 255, np.uint8), np.ones((2, 2), bool)) == 1.0


def test_an_overlay_tints_the_mask_outlines_it_and_leaves_the_rest() -> None:
    image = np.full((20, 30, 3), 100, dtype=np.uint8)
    mask = square(20, 30, 5, 5, 6)
    out = overlay(image, mask, (200, 0, 50))
    assert (out[~mask] == 100).all()
    assert out[8, 8].tolist() == [150, 50, 75], "half image, half colour inside"
    assert out[5, 5].tolist() == [200, 0, 50], "the colour itself on the outline"
    assert (image == 100).all(), "the image given is left as it was"
    assert (overlay(image, np.zeros((20, 30), bool), (200, 0, 50)) == 100).all()


@pytest.mark.parametrize("shots", [1, 5])
def test_a_panel_has_a_tile_per_support_and_two_of_the_query(shots: int) -> None:
    query = np.full((90, 120, 3), 128, dtype=np.uint8)
    truth = square(90, 120, 20, 20, 40).astype(np.uint8)
    prediction = square(90, 120, 20, 40, 40)
    other = np.full((60, 40, 3), 90, dtype=np.uint8)  # supports need not be of the query's size
    supports = [(other, square(60, 40, 10, 10, 20))] * shots
    panel = episode_panel(query, truth, prediction, supports, "cat", "best")
    width = (shots + 2) * TILE_PX + (shots + 3) * GAP_PX
    assert panel.size == (width, 2 * CAPTION_PX + TILE_PX + 2 * GAP_PX)
    pixels = opened(png_bytes(panel))
    top = GAP_PX + CAPTION_PX
    lefts = [GAP_PX + i * (TILE_PX + GAP_PX) for i in range(shots + 2)]
    tiles = [pixels[top : top + TILE_PX, left : left + TILE_PX] for left in lefts]
    colours = [SUPPORT_RGB] * shots + [TRUTH_RGB, PREDICTION_RGB]
    for tile, colour in zip(tiles, colours, strict=True):
        near = np.abs(tile.astype(int) - np.array(colour)).max(axis=-1) < 12
        assert 40 < near.sum() < TILE_PX**2 / 4, "the outline, resized"
        assert [c for c in (SUPPORT_RGB, TRUTH_RGB, PREDICTION_RGB) if has_colour(tile, c)] in ([], [colour])
    heading = pixels[:top]
    assert (heading.min(axis=-1) < 100).any(), "class and IoU are printed"


def test_a_panel_shows_what_is_ignored_by_hatching() -> None:
    query = np.full((220, 220, 3), 128, dtype=np.uint8)
    nothing = np.zeros((220, 220), dtype=bool)
    truth = np.zeros((220, 220), dtype=np.uint8)
    plain = opened(png_bytes(episode_panel(query, truth, nothing, [(query, nothing)], "cat")))
    truth[:100] = 255
    hatched = opened(png_bytes(episode_panel(query, truth, nothing, [(query, nothing)], "cat")))
    changed = (plain != hatched).any(axis=-1)
    rows, columns = np.nonzero(changed)
    left = GAP_PX + TILE_PX + GAP_PX  # the second tile
    assert (columns.min(), columns.max()) == (left + 1, left + TILE_PX - 2), "only inside the ground truth's frame"
    assert rows.max() < GAP_PX + CAPTION_PX + 100


def test_a_panel_without_supports_is_refused() -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(InputError, match="at least one support"):
        episode_panel(image, image[..., 0], image[..., 0] > 0, [], "cat")


def test_charts_change_with_their_numbers_and_touch_no_global_state() -> None:
    curve = [(1, 0.9, None), (2, 0.6, 0.3), (3, 0.5, 0.4)]
    one, two = learning_curves({"fold 0": curve}), learning_curves({"fold 0": curve, "fold 1": curve[:2]})
    assert opened(one).shape == opened(two).shape
    assert one != two
    assert learning_curves({"fold 0": curve}) == one, "the same numbers give the same bytes"
    assert opened(learning_curves({"fold 0": [(1, float("nan"), None)]})).size > 0, "a diverged run still has a chart"
    assert "matplotlib.pyplot" not in sys.modules


def test_bars_are_as_long_as_their_numbers() -> None:
    def bar_lengths(png: bytes, colour: tuple[int, int, int]) -> list[int]:
        rows = np.abs(opened(png).astype(int) - np.array(colour)).max(axis=-1) < 3
        lengths = {int(row.sum()) for row in rows[60:]}  # below the legend
        return sorted(length for length in lengths if length > 40)

    trained = (0x00, 0x72, 0xB2)
    lengths = bar_lengths(class_bars({"trained": {"cat": 0.3, "dog": 0.6}}), trained)
    assert lengths[-1] / lengths[0] == pytest.approx(2.0, abs=0.03)
    both = class_bars({"trained": {"cat": 0.3, "dog": 0.6}, "foreground": {"cat": 0.2}})
    assert bar_lengths(both, trained)[-1] / bar_lengths(both, (0xCC, 0xCC, 0xCC))[-1] == pytest.approx(3.0, abs=0.05)
    assert class_bars({"trained": {"cat": float("nan")}}), "a class that no episode shows has no bar"
    with pytest.raises(InputError, match="at least one series"):
        class_bars({})
