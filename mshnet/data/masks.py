"""Masks of one class as people have them: label pictures, COCO JSON, run lengths, polygons, arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mshnet.data import mask_files
from mshnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    MaskInput = (
        str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | Mapping[str, Any] | Sequence[Sequence[float]]
    )
"""A path (`mask.png`, `labels.png#3`, `annotations.json#category`, `polygons.json`), a label picture, an array of
bool or whole numbers (H, W), a COCO RLE (`size`, `counts`), or polygons (each x, y, x, y, ... in pixels)."""


TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations that swap height and width, and what makes them upright."""


def object_mask(
    given: MaskInput, height: int, width: int, image_name: str = "", orientation: int = 1
) -> Bool[np.ndarray, "H W"]:
    """Where the object is: any form of mask as bool at the size of its image (pixels, upright).

    Not 0 is object; of a file, `#LABEL` takes one label of it. `image_name` (a path) finds the image in a COCO JSON,
    and names it in errors. `orientation` is EXIF's of the image file: a mask of the size that the file stores, which
    only fits turned, is turned as the image is. Raises InputError for another size than the image's, for no object
    at all, and for what is ambiguous: colours, transparency, several labels of a palette, fractions.
    """
    what = f"the mask of '{image_name}'" if image_name else "the mask"
    mask = _as_bool(given, height, width, image_name, what)
    if mask.shape == (width, height) != (height, width) and orientation in TURNS:
        mask = np.asarray(Image.fromarray(mask).transpose(TURNS[orientation]))
    if mask.shape != (height, width):
        raise InputError(
            f"mask and image must have one size: {what} is {_size(mask.shape)}, its image {_size((height, width))} "
            "(upright); export it at the image's size"
        )
    if not mask.any():
        raise InputError(f"expected an object in {what}, found none; label one, or leave the example out")
    return mask


def _as_bool(given: Any, height: int, width: int, image_name: str, what: str) -> Bool[np.ndarray, "_ _"]:
    if isinstance(given, str | os.PathLike):
        return mask_files.read(os.fspath(given), height, width, image_name)
    if isinstance(given, Image.Image):
        return np.asarray(mask_files.labels(given, what) != 0)
    if isinstance(given, Mapping):
        return mask_files.united([(0, given)], *mask_files.declared(given.get("size"), height, width), what)
    if hasattr(given, "detach"):  # a Tensor; torch need not be loaded to see it
        given = given.detach().cpu().numpy()
    if isinstance(given, np.ndarray) and given.ndim == 2:
        if given.dtype.kind not in "bui":
            raise InputError(
                f"expected bool or whole numbers in {what}, found {given.dtype}; give e.g. probabilities > 0.5"
            )
        return np.asarray(given != 0)
    if isinstance(given, Sequence) and given and all(isinstance(polygon, Sequence | np.ndarray) for polygon in given):
        return mask_files.united([(0, list(given))], height, width, what)
    found = f"an array of shape {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
    raise InputError(
        f"expected {what} as a path, a picture, an array (H, W), a COCO RLE or a list of polygons, found {found}"
    )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]} px"
