"""What `segment` writes for a query: label PNGs that say what they were made from, and overlays."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, PngImagePlugin

from mshnet.commands.queries import Query
from mshnet.data.files import write_atomically
from mshnet.errors import InputError
from mshnet.visualize.labels import class_colour, label_overlay

CLASSES_FILE = "classes.json"
MOST_CLASSES = 255
KEY = "mshnet"
"""Of the PNG's text: fingerprints, as JSON, of the settings and of the query's bytes."""
_QUICK = 3
"""PNG's compression level: photographs hardly get smaller with more, and take long."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Where and how results are written."""

    out: Path
    classes: tuple[str, ...]
    settings: str
    """Fingerprint of all that a mask depends on beside its query."""
    overlays: bool
    overwrite: bool

    def check(self, queries: Sequence[Query]) -> None:
        """Raise InputError where results of other settings, or other files, are in the way."""
        if self.overwrite:
            return
        classes = self.out / CLASSES_FILE
        if len(self.classes) > 1 and classes.is_file() and classes.read_bytes() != _numbers(self.classes):
            raise InputError(f"expected results of these classes in '{self.out}', found others; {_advice()}")
        for query in queries:
            for file in self._files(query):
                if file.exists() and _made_from(file).get("settings") != self.settings:
                    raise InputError(f"'{file}' exists and was made otherwise; {_advice()}")

    def is_done(self, query: Query, sha256: str) -> bool:
        """Whether all is there for this query. Raises InputError where it is of another picture of this name."""
        files = self._files(query)
        if self.overwrite or not all(file.is_file() for file in files):
            return False
        if any(_made_from(file).get("query") != sha256 for file in files):
            raise InputError(f"'{files[0]}' exists and was made from another picture of this name; {_advice()}")
        return True

    def write(
        self,
        query: Query,
        sha256: str,
        image: UInt8[np.ndarray, "H W 3"],
        labels: Integer[np.ndarray, "H W"],
    ) -> None:
        """Mask and overlay. Raises InputError where they cannot be written."""
        origin = {"settings": self.settings, "query": sha256}
        if self.overlays:
            drawn = label_overlay(image, labels, self.classes)
            _put(query.overlay(self.out), _png(drawn, origin))
        # Last: with it the query is done.
        _put(query.mask(self.out), _png(label_picture(labels, len(self.classes)), origin))

    def write_classes(self) -> None:
        """Which number is which class, where there are several."""
        if len(self.classes) > 1:
            _put(self.out / CLASSES_FILE, _numbers(self.classes))

    def _files(self, query: Query) -> list[Path]:
        return [query.mask(self.out), query.overlay(self.out)] if self.overlays else [query.mask(self.out)]


def label_picture(labels: Integer[np.ndarray, "H W"], classes: int) -> Image.Image:
    """Of one class a mask of 0 and 255; of several their numbers, 1 and up, in the overlay's colours (palette)."""
    if classes == 1:
        return Image.fromarray(np.where(labels > 0, np.uint8(255), np.uint8(0)))
    picture = Image.fromarray(labels.astype(np.uint8), mode="P")
    picture.putpalette([0, 0, 0, *(value for index in range(classes) for value in class_colour(index))])
    return picture


def _numbers(classes: Sequence[str]) -> bytes:
    numbers = {name: i + 1 for i, name in enumerate(classes)}
    return f"{json.dumps(numbers, ensure_ascii=False, indent=2)}\n".encode()


def _png(picture: Image.Image, origin: dict[str, str]) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, json.dumps(origin))
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=text, compress_level=_QUICK)
    return file.getvalue()


def _made_from(file: Path) -> dict[str, Any]:
    """What a PNG says of its origin; nothing where it is not one of ours."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            found = json.loads(picture.info.get(KEY, "{}"))
    except (OSError, SyntaxError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _put(file: Path, data: bytes) -> None:
    try:
        write_atomically(str(file), data)
    except OSError as error:
        raise InputError(
            f"cannot write '{file}': {error.strerror or error}; make room, or give another --out"
        ) from error


def _advice() -> str:
    return "give another --out, or --overwrite"
