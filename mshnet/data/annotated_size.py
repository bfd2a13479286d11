"""Pictures in the orientation in which they were annotated: annotation tools differ in whether they heed EXIF."""

from __future__ import annotations

import struct

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from mshnet.data.pictures import rgb, upright
from mshnet.data.source import Folder
from mshnet.errors import InputError

TURNED = (5, 6, 7, 8)
"""EXIF's orientations that exchange height and width; 2, 3 and 4 keep them."""


def read_as_annotated(
    folder: Folder, path: str, size: tuple[int, int], labels: str
) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[str, ...]]:
    """A picture as 8-bit RGB of the size (height, width in pixels) of its labels, and what was decided about it.

    Turned upright where only that gives the size. Where both orientations have it (a square, or a picture that lies
    upside down) it stays as it is stored, and that is said. InputError where neither has it.
    """
    picture = folder.read_image(path)
    stored = (picture.height, picture.width)
    orientation = _orientation(picture)
    notes: tuple[str, ...] = (
        () if picture.mode in ("RGB", "L", "P") else (f"its pixels ({picture.mode}) became 8-bit RGB",)
    )
    if stored != size and orientation in TURNED and stored[::-1] == size:
        return rgb(upright(picture)), (*notes, "turned upright, as its labels are (EXIF)")
    if stored != size:
        raise InputError(
            f"mask and image must have one size: {labels} of '{path}' are for {size[1]}×{size[0]} px, the file is "
            f"{picture.width}×{picture.height} px; put the picture that was labelled there, or labels of this one"
        )
    if orientation != 1 and (orientation not in TURNED or size[0] == size[1]):
        notes += ("marked as turned (EXIF), and its size does not tell whether its labels are: left as stored",)
    return rgb(picture), notes


def _orientation(picture: Image.Image) -> int:
    """1..8; 1, as stored, for a picture that says nothing readable."""
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):  # Pillow's ways to say "broken"
        return 1
    return found if found in range(1, 9) else 1
