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
    folder: Folder, path: str, size: tuple[int, int], annotated_by: str
) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[str, ...]]:
    """A picture as 8-bit RGB of the size (height, width in pixels) of its annotations, and what was decided about it.

    Turned upright where only that gives the size. Where both orientations have it (a square, or a picture that lies
    upside down) it stays as it is stored, and that is said. InputError where neither has it.
    """
    picture = folder.read_image(path)
    stored = (picture.height, picture.width)
    orientation = _orientation(picture)
    if stored != size and orientation in TURNED and stored[::-1] == size:
        return rgb(upright(picture)), ()
    if stored != size:
        shown = f"{picture.width}×{picture.height} px"
        raise InputError(
            f"mask and image must have one size: {annotated_by} of '{path}' are for {size[1]}×{size[0]} px, the file "
            f"is {shown}; annotate the file as it is, or put the one that was annotated in its place"
        )
    ambiguous = orientation != 1 and (orientation not in TURNED or size[0] == size[1])
    note = f"'{path}' is marked as turned (EXIF {orientation}) and its size does not tell whether its labels are too"
    return rgb(picture), (f"{note}: taken as it is stored; look at it",) if ambiguous else ()


def _orientation(picture: Image.Image) -> int:
    """1..8; 1, as stored, for a picture that says nothing readable."""
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):  # Pillow's ways to say "broken"
        return 1
    return found if found in range(1, 9) else 1
