"""Pictures and masks as users have them: files, PIL pictures, arrays and tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from mshnet.data import pictures
from mshnet.data.masks import object_mask
from mshnet.data.picture_files import opened, read_picture
from mshnet.errors import InputError

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A path or URI (turned upright by its EXIF orientation), a PIL picture, a uint8 array (H, W, 3) or (H, W), or a uint8
tensor (3, H, W); all but files are taken as their pixels lie."""
_EXIF_ORIENTATION = 0x0112
Polygon = Sequence[float | int]
MaskInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | Mapping[str, Any] | Sequence[Polygon]
"""A file (`mask.png`, `labels.png#3`, `annotations.json#category`, `polygons.json`), a PIL picture, a bool or integer
array or tensor (H, W), a COCO RLE (a mapping with `size` and `counts`), or polygons, each x, y, x, y, ... in pixels.
What is not 0 is the object."""


def read_image(image: ImageInput, what: str = "image") -> UInt8[np.ndarray, "H W 3"]:
    """8-bit RGB. Raises InputError, saying `what` it was, for what is no picture."""
    if isinstance(image, str | os.PathLike):
        return read_picture(image)
    if isinstance(image, Image.Image):
        return pictures.rgb(image)
    pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not _is_picture(pixels, image):
        found = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(image).__name__
        raise InputError(
            f"{what}: expected a path, a PIL picture, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor (3, H, W), "
            f"found {found}; convert it, 0..255 from dark to bright"
        )
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    return np.ascontiguousarray(np.moveaxis(pixels, 0, -1) if isinstance(image, Tensor) else pixels)


def _is_picture(pixels: np.ndarray, image: object) -> bool:
    channels = pixels.shape[0 if isinstance(image, Tensor) else -1] if pixels.ndim == 3 else 3
    return pixels.ndim in (2, 3) and channels == 3 and pixels.size > 0


def read_example(image: ImageInput, mask: MaskInput) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]:
    """A labelled example: its pixels, and where the object is. Of files both are upright.

    A COCO JSON knows an image by its path. Raises InputError for what is no picture, and for a mask that is none, is of
    another size, shows no object, or would be a guess.
    """
    name, orientation = "", 1
    if isinstance(image, str | os.PathLike):
        name, picture = os.fspath(image), opened(image)
        orientation = int(picture.getexif().get(_EXIF_ORIENTATION, 1))
        image = pictures.upright(picture)
    pixels = read_image(image)
    return pixels, object_mask(mask, pixels.shape[0], pixels.shape[1], name, orientation)
