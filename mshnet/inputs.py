"""Pictures and masks as users have them: files, PIL pictures, arrays and tensors."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from mshnet.data import pictures
from mshnet.data.filesystem import filesystem
from mshnet.data.source import FORMATS, opened_picture
from mshnet.errors import InputError

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A path or URI (JPEG, PNG, WebP, BMP; turned upright by its EXIF orientation), a PIL picture, a uint8 array (H, W, 3)
or (H, W), or a uint8 tensor (3, H, W); all but paths are taken as their pixels lie."""
MaskInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | Mapping[str, Any] | Sequence[Sequence[float]]
"""A path or URI of a PNG, a PIL picture, a bool or integer array or tensor (H, W), COCO's run lengths (a mapping with
`size` and `counts`), or polygons, each x, y, x, y, ... in pixels. What is not 0 is the object."""


def read_image(image: ImageInput, what: str = "image") -> UInt8[np.ndarray, "H W 3"]:
    """8-bit RGB. Raises InputError, beginning with `what` it was, for what is no picture."""
    if isinstance(image, Image.Image):
        return pictures.rgb(image)
    if isinstance(image, str | os.PathLike):
        return pictures.rgb(pictures.upright(_opened(os.fspath(image), what, FORMATS)))
    pixels = image.detach().cpu().movedim(0, -1).numpy() if isinstance(image, Tensor) and image.ndim == 3 else image
    pixels = np.asarray(pixels)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InputError(
            f"{what}: expected uint8 pixels, an array (H, W, 3) or (H, W) or a tensor (3, H, W), found "
            f"{type(image).__name__} of {pixels.dtype} {tuple(np.shape(image))}; convert it, 0..255 for dark to bright"
        )
    return np.ascontiguousarray(pixels)


def read_mask(mask: MaskInput, size: tuple[int, int], what: str = "mask") -> Bool[np.ndarray, "H W"]:
    """Where the object is, for an image of that height and width.

    Raises InputError, beginning with `what` it was, for what is no mask, is of another size, or shows no object.
    """
    found = _mask_pixels(mask, size, what)
    if found.shape != size:
        turned = " (an image file is turned upright by its EXIF orientation)" if found.shape == size[::-1] else ""
        raise InputError(
            f"{what}: expected {size[1]}×{size[0]} px as its image, found {found.shape[1]}×{found.shape[0]} px{turned}"
            "; give the mask of this image, at its size"
        )
    if not found.any():
        raise InputError(f"{what}: expected an object, found only 0; mark it with any other value")
    return found


def _mask_pixels(mask: MaskInput, size: tuple[int, int], what: str) -> Bool[np.ndarray, "_ _"]:
    if isinstance(mask, str | os.PathLike):
        mask = _opened(os.fspath(mask), what, ("PNG",))
    if isinstance(mask, Image.Image):
        if len(mask.getbands()) > 1:
            raise InputError(f"{what}: expected one channel (grey, palette or 1 bit), found {mask.mode}; convert it")
        return np.not_equal(np.asarray(mask), 0)
    if isinstance(mask, Mapping) or not isinstance(mask, np.ndarray | Tensor):
        return _from_annotation(mask, size, what)
    pixels = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if pixels.ndim != 2 or pixels.dtype.kind not in "bui":
        raise InputError(
            f"{what}: expected bools or integers (H, W), found {pixels.dtype} {tuple(pixels.shape)}; compare it with a "
            "threshold, or take one channel"
        )
    return np.not_equal(pixels, 0)


def _from_annotation(
    mask: Mapping[str, Any] | Sequence[Sequence[float]], size: tuple[int, int], what: str
) -> Bool[np.ndarray, "_ _"]:
    raise InputError(f"{what}: expected a PNG, picture, array or tensor, found {type(mask).__name__}")


def _opened(uri: str, what: str, formats: tuple[str, ...]) -> Image.Image:
    """A decoded picture from a path or URI."""
    fs, path = filesystem(uri)
    try:
        data = fs.cat_file(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{what}: no file {uri!r}; give the path or URI of a picture") from error
    try:
        picture = opened_picture(data, formats)
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's three ways to say "broken"
        raise InputError(
            f"{what}: expected a whole picture ({', '.join(formats)}) in {posixpath.basename(path)!r}, found "
            f"{len(data)} bytes that are none ({error}); convert the file, or fetch it again"
        ) from error
    return picture
