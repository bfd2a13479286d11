from __future__ import annotations

import dataclasses
import io
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mshnet.errors import InputError
from mshnet.visualize import (
    Measured,
    Shown,
    class_bars,
    energy_picture,
    episode_figure,
    episode_panel,
    foreground_iou,
    interval_chart,
    learning_curves,
    overlay,
    png_bytes,
    size_bars,
)
from mshnet.visualize.energy import BAR_PX, NUMBERS_PX, OPACITY
from mshnet.visualize.style import GAP_PX, PREDICTION_RGB, SUPPORT_RGB, TEXT_PX, TILE_PX, TRUTH_RGB

TOP = GAP_PX + TEXT_PX
"""Of the first row of tiles."""


def square(height: int, width: int, top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def near(pixels: np.ndarray, colour: tuple[int, int, int], by: int = 12) -> np.ndarray:
    return np.asarray(np.abs(pixels.astype(int) - np.array(colour)).max(axis=-1) < by)


def episode(shots: int = 1) -> Shown:
    """A query of 90 × 120 px and supports of another size, in plain grey."""
    support = (np.full((60, 40, 3), 90, dtype=np.uint8), square(60, 40, 10, 10, 20))
    return Shown(
        query=np.full((90, 120, 3), 128, dtype=np.uint8),
        truth=square(90, 120, 20, 20, 40).astype(np.uint8),
        prediction=square(90, 120, 20, 40, 40),
        supports=[support] * shots,
        class_name="cat",
        iou=1 / 3,
    )


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


def test_a_panel_shows_support_query_truth_and_prediction_in_this_order() -> None:
    panel = episode_panel(episode(), "best")
    assert panel.size == (4 * (TILE_PX + GAP_PX) + GAP_PX, 2 * TEXT_PX + TILE_PX + 2 * GAP_PX)
    pixels = opened(png_bytes(panel))
    tiles = [pixels[TOP : TOP + TILE_PX, left : left + TILE_PX] for left in range(GAP_PX, 900, TILE_PX + GAP_PX)]
    # Of a tile's pixels: the query's square of 40 px is 80 px wide, its outline 2 px; the support's 20 px likewise.
    drawn = [[int(near(tile, colour).sum()) for colour in (SUPPORT_RGB, TRUTH_RGB, PREDICTION_RGB)] for tile in tiles]
    outlines = [[n > 300 for n in colours] for colours in drawn]
    assert outlines == [[True, False, False], [False, False, False], [False, True, False], [False, False, True]]
    ys, xs = np.nonzero(near(tiles[3], PREDICTION_RGB))
    # 90 × 120 px fit the tile with 30 rows of paper above; the prediction is 40 px to the right, a tile has 2 per px.
    assert (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1) == pytest.approx((80, 160, 70, 150), abs=1)
    assert (pixels[:TOP].min(axis=-1) < 100).any(), "class and IoU are printed"


@pytest.mark.parametrize("shots", [2, 5])
def test_several_supports_share_two_rows_of_smaller_tiles(shots: int) -> None:
    one, several = episode_panel(episode()), episode_panel(episode(shots))
    columns = (shots + 1) // 2
    assert several.height == one.height
    assert several.width - one.width == pytest.approx((columns - 2) * TILE_PX / 2, abs=3)
    pixels = opened(png_bytes(several))[TOP : TOP + TILE_PX]
    green = near(pixels[:, : GAP_PX + columns * TILE_PX // 2], SUPPORT_RGB)
    assert green[: TILE_PX // 2].sum() > 0
    assert green[TILE_PX // 2 :].sum() > 0
    assert green[: TILE_PX // 2].sum() / green[TILE_PX // 2 :].sum() == pytest.approx(
        columns / (shots - columns), rel=0.1
    )


def test_a_panel_shows_what_is_ignored_by_hatching() -> None:
    shown = episode()
    ignored = np.where(square(90, 120, 0, 0, 15), 255, shown.truth).astype(np.uint8)
    plain = opened(png_bytes(episode_panel(shown)))
    hatched = opened(png_bytes(episode_panel(dataclasses.replace(shown, truth=ignored))))
    rows, columns = np.nonzero((plain != hatched).any(axis=-1))
    left = GAP_PX + 2 * (TILE_PX + GAP_PX)  # the third tile
    assert left <= columns.min() <= columns.max() < left + 31, "15 px, two of the tile's each"
    assert TOP + 30 <= rows.min() <= rows.max() < TOP + 61


def test_an_episode_without_supports_is_refused() -> None:
    with pytest.raises(InputError, match="at least one support"):
        episode(0)


def maps(values: dict[str, tuple[float, float, float]]) -> dict[tuple[int, str], np.ndarray]:
    """Maps of one value each, by similarity, of blocks 4, 3, 2."""
    return {
        (level, name): np.full((level, level), value)
        for name, of_blocks in values.items()
        for level, value in zip((5, 4, 3), of_blocks, strict=True)
    }


def test_energy_maps_share_a_row_s_scale_and_the_colours_say_the_values() -> None:
    shown = dataclasses.replace(episode(), truth=np.zeros((90, 120), np.uint8))
    picture = energy_picture(shown, maps({"cosine": (0.1, 0.2, 0.3), "prototype": (0.2, 0.9, 0.4)}))
    assert picture.height == 2 * GAP_PX + TEXT_PX + 2 * (TILE_PX + TEXT_PX)
    pixels = opened(png_bytes(picture)).astype(float)
    start = picture.width - GAP_PX - NUMBERS_PX - BAR_PX - 3 * (TILE_PX + GAP_PX)
    shares = [[0.0, 0.5, 1.0], [0.0, 1.0, 0.2 / 0.7]]
    for row, of_blocks in enumerate(shares):
        for column, share in enumerate(of_blocks):
            y = TOP + row * (TILE_PX + TEXT_PX) + TILE_PX // 2
            x = start + column * (TILE_PX + GAP_PX) + TILE_PX // 2
            colour = 255 * np.array(matplotlib.colormaps["viridis"](share)[:3])
            np.testing.assert_allclose(pixels[y, x], OPACITY * colour + (1 - OPACITY) * 128, atol=2)
    # The bar of the first row: low at its foot, high at its head, as over middle grey.
    bar = pixels[TOP + 2 : TOP + TILE_PX - 2, start + 3 * (TILE_PX + GAP_PX) + BAR_PX // 2]
    for end, share in ((0, 1.0), (-1, 0.0)):
        colour = 255 * np.array(matplotlib.colormaps["viridis"](share)[:3])
        np.testing.assert_allclose(bar[end], OPACITY * colour + (1 - OPACITY) * 128, atol=4)


def test_an_energy_map_keeps_its_place_and_the_object_its_outline() -> None:
    energy = np.zeros((9, 12))
    energy[2:6, 2:6] = 1  # where the truth is
    shown = episode()
    pixels = opened(png_bytes(energy_picture(shown, {(level, "cosine"): energy for level in (5, 4, 3)})))
    start = pixels.shape[1] - GAP_PX - NUMBERS_PX - BAR_PX - 3 * (TILE_PX + GAP_PX)
    tile = pixels[TOP + 30 : TOP + TILE_PX - 30, start : start + TILE_PX]
    yellow = OPACITY * 255 * np.array(matplotlib.colormaps["viridis"](1.0)[:3]) + (1 - OPACITY) * 128
    ys, xs = np.nonzero(near(tile, tuple(yellow.astype(int))))
    assert (ys.mean(), xs.mean()) == pytest.approx((80, 80), abs=2), "twice (20 + 40 / 2) px"
    white = near(tile, (255, 255, 255), by=1)
    assert white[41, 41:119].all(), "the true square's upper edge"
    assert not white[60:100, 60:100].any()


def test_one_similarity_has_one_row_beside_support_and_query() -> None:
    picture = energy_picture(episode(), maps({"cosine": (0.1, 0.2, 0.3)}))
    assert picture.height == 2 * GAP_PX + TEXT_PX + TILE_PX + TEXT_PX
    assert picture.width > 5 * TILE_PX
    with pytest.raises(InputError, match="a map for each block and similarity"):
        energy_picture(episode(), {(5, "cosine"): np.zeros((2, 2)), (4, "prototype"): np.zeros((2, 2))})


def test_a_figure_has_a_column_of_panels_for_each_setting() -> None:
    one, five = (png_bytes(episode_panel(episode(shots))) for shots in (1, 5))
    figure = opened(episode_figure({"5-shot": [five], "1-shot": [one, one]}))
    small, wide = opened(one), opened(five)
    top = figure.shape[0] - 2 * small.shape[0]
    assert (figure[top : top + small.shape[0], : wide.shape[1]] == wide).all()
    assert (figure[top + small.shape[0] :, -small.shape[1] :] == small).all()
    assert (figure[top + small.shape[0] :, : wide.shape[1]] == 255).all(), "the shorter column ends"
    with pytest.raises(InputError, match="at least one panel"):
        episode_figure({"1-shot": []})


def test_charts_change_with_their_numbers_and_touch_no_global_state() -> None:
    curve = [(1, 0.9, None), (2, 0.6, 0.3), (3, 0.5, 0.4)]
    one, two = learning_curves({"fold 0": curve}), learning_curves({"fold 0": curve, "fold 1": curve[:2]})
    assert opened(one).shape == opened(two).shape
    assert one != two
    assert learning_curves({"fold 0": curve}) == one, "the same numbers give the same bytes"
    assert opened(learning_curves({"fold 0": [(1, float("nan"), None)]})).size > 0, "a diverged run still has a chart"
    assert "matplotlib.pyplot" not in sys.modules


def widths(png: bytes, colour: tuple[int, int, int], below: int = 60) -> list[int]:
    """How much of each row has the colour, rows with little of it left out."""
    rows = near(opened(png), colour, by=3)
    lengths = {int(row.sum()) for row in rows[below:]}  # below the legend
    return sorted(length for length in lengths if length > 40)


def test_bars_are_as_long_as_their_numbers() -> None:
    trained = (0x00, 0x72, 0xB2)
    lengths = widths(class_bars({"trained": {"cat": 0.3, "dog": 0.6}}), trained)
    assert lengths[-1] / lengths[0] == pytest.approx(2.0, abs=0.03)
    both = class_bars({"trained": {"cat": 0.3, "dog": 0.6}, "foreground": {"cat": 0.2}})
    assert widths(both, trained)[-1] / widths(both, (0xCC, 0xCC, 0xCC))[-1] == pytest.approx(3.0, abs=0.05)
    assert class_bars({"trained": {"cat": float("nan")}}), "a class that no episode shows has no bar"
    with pytest.raises(InputError, match="at least one series"):
        class_bars({})


def test_a_bar_s_whisker_is_as_long_as_its_interval() -> None:
    ink = (0x22, 0x22, 0x22)
    series = {"trained": {"cat": 0.5, "dog": 0.5}}
    narrow = widths(class_bars(series, {"cat": (0.4, 0.6)}), ink)
    wide = widths(class_bars(series, {"cat": (0.35, 0.65)}), ink)
    assert not widths(class_bars(series), ink)
    assert wide[-1] / narrow[-1] > 1.3


def test_an_interval_is_drawn_from_its_low_to_its_high() -> None:
    rows = [
        Measured(name="mean", value=0.5, low=0.45, high=0.55, group="mean"),
        Measured(name="cat", value=0.5, low=0.4, high=0.6, group="fold 0"),
    ]
    png = interval_chart(rows, "mIoU", "IoU, %")
    mean, fold = (widths(png, colour, below=0)[-1] for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)))
    assert fold / mean == pytest.approx(2.0, abs=0.05)
    with pytest.raises(InputError, match="at least one number"):
        interval_chart([], "", "")


def test_bars_by_size_are_as_high_as_their_numbers() -> None:
    pixels = opened(size_bars({"fold 0": {"small": (0.2, 10), "large": (0.6, 30)}, "fold 1": {"large": (0.3, 5)}}))
    first, second = (near(pixels, colour, by=3).sum(axis=0) for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)))
    heights = sorted({int(n) for n in first if n > 20})
    assert heights[-1] / heights[0] == pytest.approx(3.0, abs=0.15)
    assert int(second.max()) / heights[-1] == pytest.approx(0.5, abs=0.05)
    with pytest.raises(InputError, match="at least one size"):
        size_bars({"fold 0": {}})
