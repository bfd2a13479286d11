"""A result on its picture, at the picture's own size: each class tinted and outlined, a legend below."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from mshnet.errors import InputError
from mshnet.visualize.style import INK, PAPER, font

if TYPE_CHECKING:
    from PIL import Image

Colour = tuple[int, int, int]
# First a magenta that skin, fur, wood, grass and sky have not; then Okabe and Ito's, told apart with any colour vision.
_COLOURS: tuple[Colour, ...] = (
    (216, 27, 140), (0, 114, 178), (230, 159, 0), (0, 158, 115), (86, 180, 233), (213, 94, 0), (240, 228, 66),
)  # fmt: skip
TINT = 0.45
"""Share of the class's colour inside of its outline."""
SMALLEST_TEXT_PX = 9


def class_colour(index: int) -> Colour:
    """Of the class at this place (0 first); beyond seven, hues that lie far apart."""
    if index < len(_COLOURS):
        return _COLOURS[index]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def label_overlay(
    image: UInt8[np.ndarray, "H W 3"], labels: Integer[np.ndarray, "_ _"], classes: Sequence[str], legend: bool = True
) -> Image.Image:
    """The picture with every class tinted and outlined, a white line within; no pixel outside of them changes.

    `labels` is 0 on the background and i + 1 on `classes[i]` (of a mask: `mask.astype(int)` and one name). The legend
    is a strip below the picture, H stays as it is above it: names and shares of the picture. Raises InputError where
    sizes differ or a label has no name.
    """
    from PIL import Image

    if labels.shape != image.shape[:2]:
        raise InputError(f"expected labels of the image's size {image.shape[:2]}, found {labels.shape}")
    if labels.max(initial=0) > len(classes):
        raise InputError(f"expected labels up to {len(classes)}, one for each class, found {labels.max()}")
    drawn = image.copy()
    width = max(1, round(min(labels.shape) / 200))
    for index in range(len(classes)):
        mask = labels == index + 1
        if mask.any():
            _draw(drawn, mask, class_colour(index), width)
    if not legend:
        return Image.fromarray(drawn)
    shares = [float((labels == index + 1).mean()) for index in range(len(classes))]
    return _with_legend(drawn, classes, shares)


def _draw(pixels: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"], colour: Colour, width: int) -> None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    # A margin of a pixel, so that the edge is seen; none at the picture's border, which is no edge.
    box = (slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2))
    part, inside = pixels[box], mask[box]
    for channel, value in enumerate(colour):
        tinted = np.rint((1 - TINT) * np.arange(256) + TINT * value).astype(np.uint8)
        part[inside, channel] = tinted[part[inside, channel]]
    core = _eroded(inside, width)
    part[core & ~_eroded(core, max(1, width // 2))] = PAPER
    part[inside & ~core] = colour


def _eroded(mask: Bool[np.ndarray, "h w"], width: int) -> Bool[np.ndarray, "h w"]:
    """What lies at least `width` pixels (in rows and columns) from the edge; by doubling, as pictures may be large."""
    out = mask
    for axis in (0, 1):
        done = 0
        window = out
        while done < width:
            step = min(max(done, 1), width - done)
            window = _shifted(window, step, axis) & window & _shifted(window, -step, axis)
            done += step
        out = window
    return out


def _shifted(mask: Bool[np.ndarray, "h w"], by: int, axis: int) -> Bool[np.ndarray, "h w"]:
    """Rows or columns moved; beyond the border is as at it."""
    where = np.clip(np.arange(mask.shape[axis]) + by, 0, mask.shape[axis] - 1)
    return np.take(mask, where, axis=axis)


def _with_legend(pixels: UInt8[np.ndarray, "H W 3"], classes: Sequence[str], shares: Sequence[float]) -> Image.Image:
    from PIL import Image, ImageDraw

    height, width = pixels.shape[:2]
    entries = [f"{name}  {100 * share:.1f} %" for name, share in zip(classes, shares, strict=True)]
    text_px = _text_size(entries, width)
    face, pad = font(text_px), text_px // 2
    room_px = width - 2 * text_px
    entries = [_cut(name, f"  {100 * s:.1f} %", face, room_px) for name, s in zip(classes, shares, strict=True)]
    places, line_px = [], text_px + pad
    left, top = pad, pad
    for entry in entries:
        entry_px = text_px + pad + round(face.getlength(entry)) + 2 * pad
        if left > pad and left + entry_px > width:
            left, top = pad, top + line_px
        places.append((left, top))
        left += entry_px
    out = Image.new("RGB", (width, height + top + line_px), PAPER)
    out.paste(Image.fromarray(pixels), (0, 0))
    draw = ImageDraw.Draw(out)
    for index, (entry, (x, y)) in enumerate(zip(entries, places, strict=True)):
        draw.rectangle((x, height + y, x + text_px - 1, height + y + text_px - 1), fill=class_colour(index))
        middle = height + y + text_px // 2
        draw.text((x + text_px + pad, middle), entry, fill=INK, font=face, anchor="lm")
    return out


def _text_size(entries: Sequence[str], width: int) -> int:
    """By the picture's width, less where the longest entry would not fit, but still to be read."""
    size = max(12, width // 36)
    while size > SMALLEST_TEXT_PX and max(map(font(size).getlength, entries)) + 2 * size > width:
        size -= 1
    return size


def _cut(name: str, share: str, face: Any, room_px: int) -> str:
    """The entry, its name shortened where it is longer than the room."""
    kept = name
    while kept and face.getlength(f"{kept}{share}") > room_px:
        kept = kept.removesuffix("…")[:-1].rstrip() + "…" if len(kept) > 1 else ""
    return f"{kept}{share}"
