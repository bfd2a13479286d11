"""Pictures of any kind as 8-bit RGB, whatever a camera, a scanner or a drawing program made of them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image, ImageOps

SENSOR_BITS = (8, 10, 12, 14, 16)
"""Of the numbers that cameras, scanners and microscopes give; files keep the ones between 8 and 16 in 16 bits."""


def upright(picture: Image.Image) -> Image.Image:
    """As a viewer shows it: turned by EXIF's orientation, where it has one."""
    return ImageOps.exif_transpose(picture)


def rgb(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """8-bit RGB in stored orientation.

    Transparent places show white paper. Whole numbers of more than 8 bits are divided by a power of two: the
    smallest of a sensor's depths (8, 10, 12, 14 or 16 bits) that holds the picture's largest becomes 8 bits.
    Fractions between 0 and 1 are multiplied by 255, those up to 255 rounded. Any other range of numbers (negative,
    or beyond 16 bits) is stretched from its lowest to its highest; what is not a number is black.
    """
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = _grey(np.asarray(picture))
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        paper = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(paper, coloured)
    return np.array(picture.convert("RGB"), dtype=np.uint8)


def _grey(numbers: Integer[np.ndarray, "H W"] | Float[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """One number a pixel as 8 bits, by the rule that `rgb` states."""
    if numbers.dtype.kind == "f":
        sound = np.nan_to_num(numbers.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(sound.min()), float(sound.max())
        if low >= 0 and high <= 255:
            return np.rint(sound * (255 if high <= 1 else 1)).astype(np.uint8)
        return _stretched(sound, low, high)
    low, high = int(numbers.min()), int(numbers.max())
    depth = next((bits for bits in SENSOR_BITS if high < 2**bits), 0)
    if low < 0 or not depth:
        return _stretched(numbers.astype(np.float64), float(low), float(high))
    return (numbers.astype(np.int64) >> (depth - 8)).astype(np.uint8)


def _stretched(numbers: Float[np.ndarray, "H W"], low: float, high: float) -> UInt8[np.ndarray, "H W"]:
    return np.rint((numbers - low) * (255 / max(high - low, 1e-300))).clip(0, 255).astype(np.uint8)
