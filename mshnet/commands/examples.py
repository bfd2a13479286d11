"""What the verbs share: labelled examples from files, and the model that they are for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, UInt8

from mshnet.data.filesystem import filesystem
from mshnet.data.masks import object_mask
from mshnet.data.picture_files import opened
from mshnet.data.pictures import rgb, upright
from mshnet.errors import InputError

if TYPE_CHECKING:
    from mshnet.predict import Segmenter

Precision = Literal["float32", "bfloat16"]
Examples = tuple[list[UInt8[np.ndarray, "_ _ 3"]], list[Bool[np.ndarray, "_ _"]]]
_EXIF_ORIENTATION = 0x0112
_REGISTERED = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")
"""Of an address such as models:/NAME/3; a URI of files has two slashes."""


def read_examples(pairs: Sequence[tuple[str, str]]) -> Examples:
    """Images (upright) and masks of (image, mask) paths; the forms of masks are `mshnet.data.masks`'.

    Raises InputError, naming the file, for what cannot be used.
    """
    if not pairs:
        raise InputError("expected one or more examples, --support IMAGE MASK, got none")
    images, masks = [], []
    for image, mask in pairs:
        picture = opened(image)
        pixels = rgb(upright(picture))
        orientation = int(picture.getexif().get(_EXIF_ORIENTATION, 1))
        height, width = pixels.shape[:2]
        images.append(pixels)
        masks.append(object_mask(mask, height, width, image, orientation))
    return images, masks


def open_segmenter(
    model: str, device: str = "auto", precision: Precision = "float32", tracking_uri: str = ""
) -> Segmenter:
    """Of a model folder (path or URI) or a registered model (models:/NAME@ALIAS, models:/NAME/VERSION)."""
    from mshnet.predict import Segmenter

    if _REGISTERED.match(model):
        return Segmenter.from_registry(model, tracking_uri=tracking_uri, device=device, precision=precision)
    return Segmenter.from_checkpoint(model, device=device, precision=precision)


def refuse_existing(uri: str, overwrite: bool, what: str) -> None:
    """Raise InputError where there is a file that was not to be written over."""
    fs, path = filesystem(uri)
    if not overwrite and fs.exists(path):
        raise InputError(f"expected no file at '{uri}' yet, found one; give another name for {what}, or --overwrite")
