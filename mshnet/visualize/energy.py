"""Energy maps over the query: where each block's similarities see the supports' object (paper, section 6.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from mshnet.errors import InputError
from mshnet.visualize.panels import Shown, fitted, fitted_size, framed, outline, support_tile
from mshnet.visualize.style import (
    CAPTION,
    FRAME,
    GAP_PX,
    HEADING,
    INK,
    NOTE,
    PAPER,
    SOFT,
    TEXT_PX,
    TILE_PX,
    TRUTH_RGB,
    font,
)

if TYPE_CHECKING:
    from PIL import Image

COLOURS = "viridis"
"""Perceptually uniform, and readable in grey."""
OPACITY = 0.7
BAR_PX = 18
NUMBERS_PX = 48


def energy_picture(shown: Shown, energies: Mapping[tuple[int, str], Float[np.ndarray, "_ _"]]) -> Image.Image:
    """Supports and query on the left; a row of maps per similarity, deepest block first, over the query in grey.

    `energies` (0..1) by (level, similarity), of any size: `mshnet.explain.energy_maps`. The colours of a row span the
    lowest to the highest value of its maps together, which the bar beside it says, so maps compare within a row. The
    true object is outlined in white.
    """
    from PIL import Image, ImageDraw

    from mshnet.explain import BLOCKS

    similarities = list(dict.fromkeys(similarity for _, similarity in energies))
    levels = [level for level in BLOCKS if any(level == key for key, _ in energies)]
    if not similarities or len(energies) != len(levels) * len(similarities):
        raise InputError(f"expected a map for each block and similarity, got {sorted(energies)}")
    supports = "support" if len(shown.supports) == 1 else "supports"
    left = [
        (support_tile(shown.supports), supports),
        (framed(shown.query, shown.truth == 1, TRUTH_RGB), "query, truth"),
    ]
    beside = left if len(similarities) > 1 else [(_side_by_side([t for t, _ in left]), f"{supports}; query, truth")]
    margin = max(tile.width for tile, _ in beside)
    row_px = TILE_PX + TEXT_PX
    start = GAP_PX + margin + 3 * GAP_PX
    width = start + len(levels) * (TILE_PX + GAP_PX) + BAR_PX + NUMBERS_PX + GAP_PX
    picture = Image.new("RGB", (width, 2 * GAP_PX + TEXT_PX + len(similarities) * row_px), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((GAP_PX, GAP_PX), shown.class_name, fill=INK, font=font(HEADING))
    for column, level in enumerate(levels):
        middle = start + column * (TILE_PX + GAP_PX) + TILE_PX // 2
        draw.text((middle, GAP_PX), BLOCKS[level], fill=INK, font=font(HEADING), anchor="ma")
    for row, similarity in enumerate(similarities):
        top = GAP_PX + TEXT_PX + row * row_px
        if row < len(beside):
            tile, caption = beside[row]
            picture.paste(tile, (GAP_PX + (margin - tile.width) // 2, top))
            draw.text((GAP_PX + margin // 2, top + TILE_PX + 5), caption, fill=INK, font=font(CAPTION), anchor="ma")
        maps = [energies[level, similarity] for level in levels]
        low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
        for column, energy in enumerate(maps):
            at = (start + column * (TILE_PX + GAP_PX), top)
            picture.paste(_energy_tile(shown, energy, low, high), at)
        middle = start + (len(levels) * (TILE_PX + GAP_PX) - GAP_PX) // 2
        text = f"{similarity} similarity, common scale {low:.2f} to {high:.2f}"
        draw.text((middle, top + TILE_PX + 5), text, fill=INK, font=font(CAPTION), anchor="ma")
        _colour_bar(picture, (start + len(levels) * (TILE_PX + GAP_PX), top), low, high)
    return picture


def _side_by_side(tiles: list[Image.Image]) -> Image.Image:
    from PIL import Image

    together = Image.new("RGB", (sum(t.width for t in tiles) + GAP_PX * (len(tiles) - 1), TILE_PX), PAPER)
    left = 0
    for tile in tiles:
        together.paste(tile, (left, 0))
        left += tile.width + GAP_PX
    return together


def _energy_tile(shown: Shown, energy: Float[np.ndarray, "_ _"], low: float, high: float) -> Image.Image:
    from PIL import Image, ImageDraw

    size = fitted_size(shown.query.shape[:2], TILE_PX)
    grey = np.asarray(Image.fromarray(shown.query).convert("L").resize(size, Image.Resampling.LANCZOS))
    wide = np.asarray(Image.fromarray(energy.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    colours = _coloured((wide - low) / max(high - low, 1e-12))
    blended = _over(colours, grey[..., None])
    blended[outline(fitted(shown.truth == 1, size))] = 255
    tile = Image.new("RGB", (TILE_PX, TILE_PX), PAPER)
    drawn = Image.fromarray(blended.round().astype(np.uint8))
    tile.paste(drawn, ((TILE_PX - size[0]) // 2, (TILE_PX - size[1]) // 2))
    ImageDraw.Draw(tile).rectangle((0, 0, TILE_PX - 1, TILE_PX - 1), outline=FRAME)
    return tile


def _over(colours: Float[np.ndarray, "h w 3"], grey: Any) -> Float[np.ndarray, "h w 3"]:
    return np.asarray(OPACITY * colours + (1 - OPACITY) * grey)


def _coloured(share: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
    import matplotlib

    coloured: Any = matplotlib.colormaps[COLOURS](np.clip(share, 0, 1))
    return np.asarray(coloured[..., :3] * 255)


def _colour_bar(picture: Image.Image, at: tuple[int, int], low: float, high: float) -> None:
    from PIL import Image, ImageDraw

    left, top = at
    # Over a middle grey, as the maps are over the query.
    ramp = _over(_coloured(np.linspace(1, 0, TILE_PX)[:, None].repeat(BAR_PX, 1)), 128)
    picture.paste(Image.fromarray(ramp.round().astype(np.uint8)), (left, top))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, left + BAR_PX - 1, top + TILE_PX - 1), outline=FRAME)
    for value, y, anchor in (
        (high, top, "la"),
        ((low + high) / 2, top + TILE_PX // 2, "lm"),
        (low, top + TILE_PX, "ld"),
    ):
        draw.text((left + BAR_PX + 5, y), f"{value:.2f}", fill=SOFT, font=font(NOTE), anchor=anchor)
