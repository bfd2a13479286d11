"""What the verbs share: labelled examples from files, and files that are not to be written over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8

from mshnet.data.filesystem import filesystem
from mshnet.errors import InputError

Precision = Literal["float32", "bfloat16"]
Examples = tuple[list[UInt8[np.ndarray, "_ _ 3"]], list[Bool[np.ndarray, "_ _"]]]


def read_examples(pairs: Sequence[tuple[str, str]]) -> Examples:
    """Images (upright) and masks of (image, mask) paths; the forms of masks are `mshnet.data.masks`'.

    Raises InputError, naming the file, for what cannot be used.
    """
    from mshnet.inputs import read_example

    if not pairs:
        raise InputError("expected one or more examples, --support IMAGE MASK, got none")
    examples = [read_example(image, mask) for image, mask in pairs]
    return [image for image, _ in examples], [mask for _, mask in examples]


def refuse_existing(uri: str, overwrite: bool, what: str) -> None:
    """Raise InputError where there is a file that was not to be written over."""
    fs, path = filesystem(uri)
    if not overwrite and fs.exists(path):
        raise InputError(f"expected no file at '{uri}' yet, found one; give another name for {what}, or --overwrite")
