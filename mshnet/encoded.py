"""Queries and labelled examples as a service is sent them: pictures as base64 in JSON, within limits.

A row is one query: `query` (PNG or JPEG, base64), `supports` (a JSON list of k labelled examples' images, base64), and
`masks` (a JSON list of their k masks, each base64 PNG or COCO run lengths).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from pycocotools import mask as coco

from mshnet.data import pictures
from mshnet.data.masks import object_mask
from mshnet.data.source import opened_picture
from mshnet.errors import InputError

COLUMNS: tuple[str, ...] = ("query", "supports", "masks")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may cost. Each is set by the environment variable MSHNET_SERVE_ and its name in capitals."""

    max_rows: int = 16
    """Queries in a request."""
    max_supports: int = 50
    """Examples of a query."""
    max_image_bytes: int = 20_000_000
    """Of a PNG or JPEG file, before base64."""
    max_image_pixels: int = 25_000_000
    """Of a picture; looked at before it is decoded."""
    max_row_pixels: int = 100_000_000
    """Of a query and its examples together. Some 12 bytes of memory a pixel."""
    kept_bytes: int = 1_000_000_000
    """Memory for examples' features; those that were not asked for the longest go first."""

    @classmethod
    def from_environment(cls) -> Limits:
        """InputError naming the variable that is no whole number of 1 or more."""
        values = {}
        for field in fields(cls):
            name = f"MSHNET_SERVE_{field.name.upper()}"
            if text := os.environ.get(name, "").replace("_", ""):
                if not text.isdecimal() or not int(text):
                    raise InputError(f"expected a whole number of 1 or more in {name}, got {os.environ[name]!r}")
                values[field.name] = int(text)
        return cls(**values)


@dataclass(frozen=True)
class Row:
    """A query as it was sent, its files decoded from base64."""

    place: str
    query: bytes
    supports: tuple[bytes, ...]
    masks: tuple[bytes | Mapping[str, Any], ...]

    @property
    def examples(self) -> str:
        """Names the examples by their contents and order."""
        digest = hashlib.sha256()
        for item in (*self.supports, *self.masks):
            data = item if isinstance(item, bytes) else json.dumps(item, sort_keys=True).encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


def read_rows(sent: Sequence[tuple[object, object, object]], limits: Limits) -> Iterator[Row]:
    """Rows of the values of COLUMNS, base64 decoded, no picture opened yet.

    Raises InputError naming row and column of what cannot be used or is beyond a limit.
    """
    if not 1 <= len(sent) <= limits.max_rows:
        raise InputError(f"expected 1 to {limits.max_rows} rows, got {len(sent)}; send several requests")
    for index, (query, supports, masks) in enumerate(sent):
        row = f"row {index}"
        images, objects = _list(supports, f"{row}, supports"), _list(masks, f"{row}, masks")
        if len(images) != len(objects):
            raise InputError(
                f"{row}: expected one mask per support, got {len(images)} supports and {len(objects)} masks"
            )
        if len(images) > limits.max_supports:
            raise InputError(f"{row}: expected {limits.max_supports} supports at most, got {len(images)}")
        yield Row(
            place=row,
            query=_bytes(query, f"{row}, query", limits),
            supports=tuple(_bytes(text, f"{row}, supports[{i}]", limits) for i, text in enumerate(images)),
            masks=tuple(
                item if isinstance(item, dict) else _bytes(item, f"{row}, masks[{i}]", limits)
                for i, item in enumerate(objects)
            ),
        )


def _list(text: object, place: str) -> list[Any]:
    try:
        items = json.loads(text)  # type: ignore[arg-type]  # TypeError is caught
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{place}: expected a JSON list of base64 texts, got text that is not JSON") from error
    if not isinstance(items, list) or not items:
        raise InputError(f"{place}: expected a JSON list of one or more base64 texts")
    return items


def _bytes(text: object, place: str, limits: Limits) -> bytes:
    if not isinstance(text, str):
        raise InputError(f"{place}: expected base64 text, got {type(text).__name__}")
    if len(text) > 4 * (limits.max_image_bytes // 3 + 1):
        raise InputError(
            f"{place}: expected {limits.max_image_bytes:,} bytes at most, got {len(text) // 4 * 3:,}; send it smaller"
        )
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InputError(f"{place}: expected base64 text") from error


class Pictures:
    """Decodes a row's pictures as far as the limits allow. Raises InputError naming row and column."""

    def __init__(self, row: Row, limits: Limits) -> None:
        self._row, self._limits = row, limits
        self._left = limits.max_row_pixels

    def query(self) -> UInt8[np.ndarray, "H W 3"]:
        """8-bit RGB, upright."""
        return self._image(self._row.query, "query")

    def examples(self) -> list[tuple[UInt8[np.ndarray, "_ _ 3"], Bool[np.ndarray, "_ _"]]]:
        """Each labelled image, 8-bit RGB, upright, and where its object is."""
        return [self._example(i) for i in range(len(self._row.supports))]

    def _example(self, number: int) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]:
        image = self._image(self._row.supports[number], f"supports[{number}]")
        given, place = self._row.masks[number], f"{self._row.place}, masks[{number}]"
        mask = self._opened(given, place, ("PNG",)) if isinstance(given, bytes) else given
        try:
            return image, object_mask(mask, *image.shape[:2])
        except InputError as error:
            raise InputError(f"{place}: {error}") from error

    def _image(self, data: bytes, column: str) -> UInt8[np.ndarray, "H W 3"]:
        return pictures.rgb(pictures.upright(self._opened(data, f"{self._row.place}, {column}", ("PNG", "JPEG"))))

    def _opened(self, data: bytes, place: str, formats: tuple[str, ...]) -> Image.Image:
        try:
            picture = opened_picture(data, formats=("PNG", "JPEG"))
            if formats == ("PNG",) and picture.format != "PNG":  # JPEG would blur the edges into new values
                raise InputError(f"{place}: expected a PNG, got {picture.format}")
            pixels, most = picture.width * picture.height, self._limits.max_image_pixels
            if pixels > most:
                raise InputError(
                    f"{place}: expected {most:,} pixels at most, got {picture.width}×{picture.height}; send it smaller"
                )
            self._left -= pixels
            if self._left < 0:
                raise InputError(
                    f"{self._row.place}: expected {self._limits.max_row_pixels:,} pixels at most in all its pictures "
                    "together; send them smaller, or fewer"
                )
            picture.load()
        except InputError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{place}: expected a whole {' or '.join(formats)} image ({error})") from error
        return picture


def encode(pixels: UInt8[np.ndarray, "H W *c"]) -> str:
    """8-bit grey or RGB as base64 PNG text."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> str:
    """A mask as the JSON of COCO's compressed run lengths."""
    found = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return json.dumps({"size": list(found["size"]), "counts": found["counts"].decode()})
