"""How a picture becomes the network's square, in preprocessing and for a user's own pictures alike. Loads no torch."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def squared(image: UInt8[np.ndarray, "H W 3"], side_px: int) -> Image.Image:
    """The whole picture, its sides' proportions given up; bilinear, over all pixels that a new one covers."""
    return Image.fromarray(image).resize((side_px, side_px), Image.Resampling.BILINEAR)
