"""Pictures of any kind as 8-bit RGB, whatever a camera, a scanner or a drawing program made of them."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps


def upright(picture: Image.Image) -> Image.Image:
    """As a viewer shows it: turned by EXIF's orientation, where it has one."""
    return ImageOps.exif_transpose(picture)


def rgb(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """8-bit RGB in stored orientation."""
    return np.array(picture.convert("RGB"), dtype=np.uint8)
