"""A class as a small file: its labelled examples at the network's size, in one safetensors file with a JSON header."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import UInt8
from torch import Tensor

from mshnet.data.files import write_atomically
from mshnet.data.filesystem import filesystem
from mshnet.errors import InputError

FORMAT_VERSION = 1
HEADER = "support_set"
"""Key of the JSON in safetensors' own header, beside the tensors `images` and `masks` (8 pixels of a row in a byte)."""
NEUTRAL_THRESHOLD = 0.5


@dataclass(frozen=True, eq=False)
class SupportSet:
    """k labelled examples of a class."""

    name: str
    images: UInt8[Tensor, "k 3 S S"]
    """RGB, at the model's image size."""
    masks: UInt8[Tensor, "k S S"]
    """1 where the object is, else 0."""
    threshold: float = NEUTRAL_THRESHOLD
    """Probability from which a pixel is the object's, 0..1; 0.5, or calibrated for the model that learnt it."""
    model: str = ""
    """Fingerprint of the weights that learnt it; empty: no model in particular."""

    def __post_init__(self) -> None:
        k, side = len(self.images), self.images.shape[-1]
        if not k or self.images.shape != (k, 3, side, side) or self.masks.shape != (k, side, side):
            raise InputError(
                f"expected images (k, 3, S, S) and masks (k, S, S) of one or more examples, found "
                f"{tuple(self.images.shape)} and {tuple(self.masks.shape)}"
            )
        if not self.name.strip():
            raise InputError(f"expected a class's name, got {self.name!r}")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold must be 0..1, got {self.threshold}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size_px(self) -> int:
        """S."""
        return self.images.shape[-1]

    @property
    def object_shares(self) -> tuple[float, ...]:
        """Of each image, the share of its pixels that is the object, 0..1."""
        return tuple((self.masks != 0).flatten(1).double().mean(1).tolist())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file (path or URI), whole; what was there is replaced."""
        header = {
            "format": FORMAT_VERSION,
            "name": self.name,
            "image_size_px": self.image_size_px,
            "threshold": self.threshold,
            "model": self.model,
            "object_shares": [round(share, 6) for share in self.object_shares],
        }
        packed = np.packbits(self.masks.cpu().numpy() != 0, axis=2)
        tensors = {"images": self.images.cpu().contiguous(), "masks": torch.from_numpy(packed)}
        data = safetensors.torch.save(tensors, metadata={HEADER: json.dumps(header, ensure_ascii=False)})
        write_atomically(os.fspath(path), data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SupportSet:
        """Read what `save` wrote (path or URI); nothing in it is executed. Raises InputError for any other file."""
        uri = os.fspath(path)
        fs, place = filesystem(uri)
        try:
            data = fs.cat_file(place)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise InputError(f"no support set at {uri!r}; give a file that `SupportSet.save` wrote") from error
        try:
            header, tensors = _header(data), safetensors.torch.load(data)
        except Exception as error:
            raise _unreadable(uri, type(error).__name__) from error
        if header.get("format") != FORMAT_VERSION:
            raise InputError(
                f"expected a support set of format {FORMAT_VERSION}, found {header.get('format')!r} in {uri!r}; use "
                "the version of mshnet that wrote it"
            )
        return _checked(uri, header, tensors)


def _header(data: bytes) -> dict[str, Any]:
    """The JSON in a safetensors file's header: its length in 8 bytes, then JSON whose `__metadata__` are texts."""
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][HEADER])
    return header


def _checked(uri: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> SupportSet:
    try:
        name, side, threshold, model = (header[key] for key in ("name", "image_size_px", "threshold", "model"))
        images, packed = tensors["images"], tensors["masks"]
    except KeyError as error:
        raise _unreadable(uri, f"{error} is missing") from error
    known = isinstance(name, str) and isinstance(model, str) and isinstance(side, int)
    known = known and isinstance(threshold, int | float) and images.dtype == packed.dtype == torch.uint8
    if not known or images.shape[1:] != (3, side, side) or packed.shape != (len(images), side, (side + 7) // 8):
        raise _unreadable(uri, "header and tensors do not agree")
    masks = torch.from_numpy(np.unpackbits(packed.numpy(), axis=2, count=side))
    try:
        return SupportSet(name, images, masks, float(threshold), model)
    except InputError as error:
        raise _unreadable(uri, str(error)) from error


def _unreadable(uri: str, problem: str) -> InputError:
    return InputError(
        f"expected a support set in {uri!r}, found a file that cannot be read as one ({problem}); learn it again, or "
        "copy it anew"
    )
