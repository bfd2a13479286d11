"""An episode as a row of tiles: supports, query, ground truth, prediction (as in the paper's figure of results)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, UInt8

from mshnet.config import IGNORE_INDEX
from mshnet.errors import InputError
from mshnet.visualize.style import (
    CAPTION,
    FRAME,
    GAP_PX,
    HEADING,
    INK,
    NOTE,
    PAPER,
    PREDICTION_RGB,
    SOFT,
    SUPPORT_RGB,
    TEXT_PX,
    TILE_PX,
    TRUTH_RGB,
    font,
)

if TYPE_CHECKING:
    from PIL import Image

Support = tuple[UInt8[np.ndarray, "_ _ 3"], Bool[np.ndarray, "_ _"]]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An episode to draw. The supports may be of other sizes than the query."""

    query: UInt8[np.ndarray, "h w 3"]
    truth: UInt8[np.ndarray, "h w"]
    """1 on the object, 0 elsewhere, 255 where it does not count."""
    prediction: Bool[np.ndarray, "h w"]
    supports: Sequence[Support]
    class_name: str
    iou: float
    """0 to 1, as it was counted: at another size than this picture's it is not the picture's own."""

    def __post_init__(self) -> None:
        if not self.supports:
            raise InputError("expected at least one support to draw, got none")


def foreground_iou(truth: UInt8[np.ndarray, "h w"], prediction: Bool[np.ndarray, "h w"]) -> float:
    """IoU of the object in one image, 0 to 1, pixels labelled 255 left out; 1 where neither shows any."""
    counted = truth != IGNORE_INDEX
    wanted, found = (truth == 1) & counted, prediction & counted
    union = int((wanted | found).sum())
    return int((wanted & found).sum()) / union if union else 1.0


def overlay(
    image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], colour: tuple[int, int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with the mask tinted and outlined; outside the mask no pixel changes."""
    tint = np.array(colour, dtype=np.float64)
    out = image.astype(np.float64)
    out[mask] = 0.5 * out[mask] + 0.5 * tint
    out[outline(mask)] = tint
    return out.round().astype(np.uint8)


def outline(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The mask's own pixels along its edge, two or more wide; the picture's border is no edge."""
    inner = mask
    for _ in range(max(2, min(mask.shape) // 100)):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: Bool[np.ndarray, "h w"] = mask & ~inner
    return edge


def episode_panel(shown: Shown, title: str = "") -> Image.Image:
    """One row of tiles under a heading of class and IoU, what they are below; a support's mask is drawn on it.

    Several supports share two rows of smaller tiles. What does not count is hatched in the ground truth.
    """
    from PIL import Image, ImageDraw

    tiles = [
        (support_tile(shown.supports), "support" if len(shown.supports) == 1 else f"{len(shown.supports)} supports"),
        (framed(shown.query), "query"),
        (framed(shown.query, shown.truth == 1, TRUTH_RGB, shown.truth == IGNORE_INDEX), "ground truth"),
        (framed(shown.query, shown.prediction, PREDICTION_RGB), "prediction"),
    ]
    width = sum(tile.width + GAP_PX for tile, _ in tiles) + GAP_PX
    panel = Image.new("RGB", (width, 2 * TEXT_PX + TILE_PX + 2 * GAP_PX), PAPER)
    draw = ImageDraw.Draw(panel)
    heading = f"{shown.class_name}   IoU {100 * shown.iou:.1f} %"
    draw.text((GAP_PX, GAP_PX), heading, fill=INK, font=font(HEADING))
    draw.text((width - GAP_PX, GAP_PX + 4), title, fill=SOFT, font=font(NOTE), anchor="ra")
    left, top = GAP_PX, GAP_PX + TEXT_PX
    for tile, caption in tiles:
        panel.paste(tile, (left, top))
        draw.text((left + tile.width // 2, top + TILE_PX + 5), caption, fill=INK, font=font(CAPTION), anchor="ma")
        left += tile.width + GAP_PX
    return panel


def support_tile(supports: Sequence[Support]) -> Image.Image:
    """The supports with their masks, as high as one tile: one alone, several in two rows."""
    from PIL import Image

    if len(supports) == 1:
        return framed(*supports[0], SUPPORT_RGB)
    side = (TILE_PX - GAP_PX // 2) // 2
    step = TILE_PX - side
    columns = (len(supports) + 1) // 2
    together = Image.new("RGB", (columns * step - (step - side), TILE_PX), PAPER)
    for i, support in enumerate(supports):
        together.paste(framed(*support, SUPPORT_RGB, side_px=side), (i % columns * step, i // columns * step))
    return together


def framed(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"] | None = None,
    colour: tuple[int, int, int] = SUPPORT_RGB,
    ignored: Bool[np.ndarray, "h w"] | None = None,
    side_px: int = TILE_PX,
) -> Image.Image:
    """The image fitted into a square tile, the mask drawn at the tile's resolution so that its outline is even."""
    from PIL import Image, ImageDraw

    size = fitted_size(image.shape[:2], side_px)
    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    if mask is not None:
        pixels = overlay(pixels, fitted(mask, size), colour)
    if ignored is not None:
        pixels = _hatched(pixels, fitted(ignored, size))
    tile = Image.new("RGB", (side_px, side_px), PAPER)
    tile.paste(Image.fromarray(pixels), ((side_px - size[0]) // 2, (side_px - size[1]) // 2))
    ImageDraw.Draw(tile).rectangle((0, 0, side_px - 1, side_px - 1), outline=FRAME)
    return tile


def fitted_size(shape: tuple[int, int], side_px: int) -> tuple[int, int]:
    """Width and height of a picture of this (height, width) whose longer side is the tile's."""
    scale = side_px / max(shape)
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def fitted(where: Bool[np.ndarray, "_ _"], size: tuple[int, int]) -> Bool[np.ndarray, "_ _"]:
    """A mask at another (width, height), its edge where it was to half a pixel."""
    from PIL import Image

    grey = Image.fromarray(where.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(grey) >= 128


def _hatched(pixels: UInt8[np.ndarray, "h w 3"], where: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    rows, columns = np.indices(where.shape)
    out = pixels.copy()
    out[where] = 235
    out[where & ((rows + columns) % 6 < 2)] = 120
    return out
