"""The report's pictures: episodes with their masks, learning curves, IoU bars.

Pillow and NumPy draw the episodes; matplotlib draws the charts through its object interface, so that no
process-wide state is touched and any thread may call these.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, UInt8

from mshnet.config import IGNORE_INDEX
from mshnet.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Support = tuple[UInt8[np.ndarray, "_ _ 3"], Bool[np.ndarray, "_ _"]]
Curve = Sequence[tuple[int, float, float | None]]
"""(epoch, training loss, validation mIoU or None) per epoch."""

# Okabe and Ito's colours: told apart with any colour vision, and in grey by lightness.
SUPPORT_RGB, TRUTH_RGB, PREDICTION_RGB = (0, 158, 115), (0, 114, 178), (213, 94, 0)
FOLD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SERIES_COLOURS: Mapping[str, str] = {
    "trained": "#0072B2", "prototype": "#E69F00", "untrained": "#999999", "foreground": "#CCCCCC",
}  # fmt: skip
TILE_PX = 220
GAP_PX = 8
CAPTION_PX = 26
INK, PAPER, FRAME = (34, 34, 34), (255, 255, 255), (200, 200, 200)


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
    out[mask & ~_eroded(mask, steps=max(2, min(mask.shape) // 100))] = tint
    return out.round().astype(np.uint8)


def _eroded(mask: Bool[np.ndarray, "h w"], steps: int) -> Bool[np.ndarray, "h w"]:
    for _ in range(steps):
        padded = np.pad(mask, 1, mode="edge")  # the picture's border is no edge of the object
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def episode_panel(
    query: UInt8[np.ndarray, "h w 3"],
    truth: UInt8[np.ndarray, "h w"],
    prediction: Bool[np.ndarray, "h w"],
    supports: Sequence[Support],
    class_name: str,
    title: str = "",
) -> Image.Image:
    """One row of tiles: every support with its mask, the query with its ground truth, with the prediction.

    `truth` is 1 on the object, 0 elsewhere, 255 where it does not count (drawn hatched). The heading gives
    the class and the IoU. The supports may be of other sizes than the query.
    """
    from PIL import Image, ImageDraw

    if not supports:
        raise InputError("expected at least one support to draw, got none")
    iou = foreground_iou(truth, prediction)
    numbers = [""] if len(supports) == 1 else [f" {i}" for i in range(1, len(supports) + 1)]
    tiles = [
        (_tile(image, mask, SUPPORT_RGB), f"support{number}")
        for number, (image, mask) in zip(numbers, supports, strict=True)
    ]
    tiles.append((_tile(query, truth == 1, TRUTH_RGB, ignored=truth == IGNORE_INDEX), "query, ground truth"))
    tiles.append((_tile(query, prediction, PREDICTION_RGB), "query, prediction"))

    width = len(tiles) * TILE_PX + (len(tiles) + 1) * GAP_PX
    height = 2 * CAPTION_PX + TILE_PX + 2 * GAP_PX
    panel = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(panel)
    heading = f"{class_name}   IoU {100 * iou:.1f} %" + (f"   {title}" if title else "")
    draw.text((GAP_PX, GAP_PX), heading, fill=INK, font=_font(16))
    for column, (tile, caption) in enumerate(tiles):
        left, top = GAP_PX + column * (TILE_PX + GAP_PX), GAP_PX + CAPTION_PX
        panel.paste(tile, (left + (TILE_PX - tile.width) // 2, top + (TILE_PX - tile.height) // 2))
        draw.rectangle((left, top, left + TILE_PX - 1, top + TILE_PX - 1), outline=FRAME)
        draw.text((left, top + TILE_PX + 4), caption, fill=INK, font=_font(13))
    return panel


def _tile(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    colour: tuple[int, int, int],
    ignored: Bool[np.ndarray, "h w"] | None = None,
) -> Image.Image:
    """The image fitted into a tile, the mask drawn at the tile's resolution so that its outline is even."""
    from PIL import Image

    scale = TILE_PX / max(mask.shape)
    size = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))

    def fitted(where: Bool[np.ndarray, "_ _"]) -> Bool[np.ndarray, "_ _"]:
        return np.asarray(Image.fromarray(where).resize(size, Image.Resampling.NEAREST))

    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    drawn = overlay(pixels, fitted(mask), colour)
    return Image.fromarray(drawn if ignored is None else _hatched(drawn, fitted(ignored)))


def _hatched(pixels: UInt8[np.ndarray, "h w 3"], where: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    rows, columns = np.indices(where.shape)
    out = pixels.copy()
    out[where] = 235
    out[where & ((rows + columns) % 6 < 2)] = 120
    return out


def _font(size_px: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size_px)  # shipped with Pillow: the same on every machine


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file's content."""
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def learning_curves(histories: Mapping[str, Curve]) -> bytes:
    """PNG: training loss and validation mIoU in % by epoch, one line per entry (a fold).

    Without any validation there is one chart only.
    """
    validated = any(miou is not None for curve in histories.values() for _, _, miou in curve)
    figure = _figure(width=9.0 if validated else 5.2, height=3.2)
    charts = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    for colour, (name, curve) in zip(_cycle(FOLD_COLOURS, len(histories)), histories.items(), strict=True):
        style = {"color": colour, "label": name, "marker": "o", "markersize": 3, "linewidth": 1.6}
        charts[0].plot([epoch for epoch, _, _ in curve], [loss for _, loss, _ in curve], **style)
        if validated:
            points = [(epoch, 100 * miou) for epoch, _, miou in curve if miou is not None]
            charts[1].plot([epoch for epoch, _ in points], [miou for _, miou in points], **style)
    _dress(charts[0], "training loss", "epoch", "loss")
    if validated:
        _dress(charts[1], "mIoU on the episodes that choose the checkpoint", "epoch", "mIoU, %")
    if len(histories) > 1:
        charts[0].legend(frameon=False, fontsize=9)
    return _rendered(figure)


def class_bars(scores: Mapping[str, Mapping[str, float]]) -> bytes:
    """PNG: horizontal IoU bars in % per class, best class of the first series on top.

    `scores` is series name ("trained", then baselines) -> class name -> IoU (0 to 1). A class that a series
    lacks has no bar there.
    """
    if not scores:
        raise InputError("expected at least one series of class IoU to draw, got none")
    first = next(iter(scores.values()))
    classes = sorted({name for series in scores.values() for name in series}, key=lambda name: first.get(name, -1.0))
    thickness = 0.8 / len(scores)
    figure = _figure(width=5.8, height=1.0 + max(1, len(classes)) * (0.12 * len(scores) + 0.16))
    axes = figure.subplots()
    colours = _cycle(FOLD_COLOURS, len(scores))
    for rank, (series_name, series) in enumerate(scores.items()):
        shown = [(row, series[name]) for row, name in enumerate(classes) if math.isfinite(series.get(name, math.nan))]
        axes.barh(
            [row + 0.4 - thickness * (rank + 0.5) for row, _ in shown],
            [100 * iou for _, iou in shown],
            height=thickness * 0.9,
            color=SERIES_COLOURS.get(series_name, colours[rank]),
            label=series_name,
        )
        if rank == 0:
            for row, iou in shown:
                axes.text(100 * iou + 0.7, row + 0.4 - thickness / 2, f"{100 * iou:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlim(left=0)
    axes.margins(x=0.08, y=0.02)
    _dress(axes, "IoU by novel class", "IoU, %", "")
    axes.grid(visible=False, axis="y")
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=len(scores))
    return _rendered(figure)


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _rendered(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)  # untyped methods
    canvas.print_png(file)
    return file.getvalue()
