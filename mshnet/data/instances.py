"""COCO's instance format: what the readers of it share, from the JSON text to the masks of an image."""

from __future__ import annotations

import codecs
import mmap
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Bool

from mshnet.data.filesystem import filesystem, is_local
from mshnet.data.source import ImageRecord
from mshnet.data.temporary import temporary_room
from mshnet.errors import InputError

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
"""Of a category: it goes to reports, tables, charts and the tracker."""
Pixels = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
MASK_MODE = "union of annToMask, crowds skipped"


class _Rle(msgspec.Struct):
    size: tuple[int, int]
    counts: list[int] | str


_Segmentation = list[list[float]] | _Rle
_segmentation = msgspec.json.Decoder(_Segmentation)
_of_record = msgspec.json.Decoder(list[tuple[int, int | str, _Segmentation]])
"""What a record keeps of its instances: (class id, annotation id, polygons or run lengths)."""


def mappable(uri: str, owner: object) -> Path:
    """An annotation file where it can be mapped: a remote one's temporary local copy, which goes with its owner."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return Path(path)
    # Without a name, so that a process that is killed leaves nothing of it.
    copy = tempfile.TemporaryFile()  # noqa: SIM115 closed with the owner
    weakref.finalize(owner, copy.close)
    local = f"/dev/fd/{copy.fileno()}"
    with temporary_room(f"a copy of '{uri}'"):
        fs.get_file(path, local)
    return Path(local)


def decoded(file: Path, kind: Any, where: str) -> Any:
    """The file as a structure of `kind`, read through a memory map. InputError where it is none."""
    with file.open("rb") as opened:
        if not file.stat().st_size:
            raise InputError(f"'{where}' is empty; fetch the file again")
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped with the last Raw that lies in it
    marked = data[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8  # as Windows' programs begin a file
    try:
        return msgspec.json.decode(memoryview(data)[len(codecs.BOM_UTF8) :] if marked else data, type=kind)
    except msgspec.ValidationError as error:
        raise InputError(f"'{where}' is not in COCO's instance format: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{where}' is not valid JSON: {error}; fetch the file again") from error


def joined(parts: Iterable[tuple[int, int | str, msgspec.Raw]]) -> bytes:
    """What a record keeps of its instances: (class id, annotation id, segmentation) of each, as JSON."""
    texts = (b"[%d,%b,%b]" % (c, msgspec.json.encode(number), bytes(raw)) for c, number, raw in parts)
    return b"[%b]" % b",".join(texts)


def check_segmentation(raw: msgspec.Raw, size: tuple[int, int], number: int | str, where: str) -> None:
    """InputError unless the text is a mask of an image of that size (height, width in pixels)."""
    try:
        segmentation = _segmentation.decode(raw)
    except msgspec.ValidationError as error:
        raise InputError(
            f"'{where}': annotation {number} is neither polygons nor run lengths ({error}); mend or remove it"
        ) from error
    if isinstance(segmentation, list):
        _check_polygons(segmentation, size, number, where)
    else:
        _check_runs(segmentation, size, number, where)


def _check_polygons(polygons: list[list[float]], size: tuple[int, int], number: int | str, where: str) -> None:
    sizes = [len(polygon) for polygon in polygons] or [0]
    if min(sizes) < 6 or any(n % 2 for n in sizes):
        raise InputError(
            f"'{where}': annotation {number} has a polygon of {min(sizes) / 2:g} points, "
            "expected pairs of x and y, at least 3 points; mend or remove the annotation"
        )
    # pycocotools walks along the outline in memory, and ends the process where it does not fit.
    farthest = 2 * max(size)
    lowest, highest = min(map(min, polygons)), max(map(max, polygons))
    if lowest < -farthest or highest > farthest:
        raise InputError(
            f"'{where}': annotation {number} has a point at {lowest if lowest < -farthest else highest:g}, far outside "
            f"of its image of {size[1]}×{size[0]} px; mend or remove the annotation"
        )


def _check_runs(rle: _Rle, size: tuple[int, int], number: int | str, where: str) -> None:
    if rle.size != size:
        raise InputError(
            f"mask and image must have one size: '{where}', annotation {number} has an RLE of size "
            f"{list(rle.size)}, its image is {list(size)} (height, width)"
        )
    # pycocotools gives whatever lies in memory where runs do not fill the image.
    runs = rle.counts if isinstance(rle.counts, list) else _runs(rle.counts)
    if min(runs, default=-1) < 0 or sum(runs) != size[0] * size[1]:
        raise InputError(
            f"'{where}': annotation {number} has run lengths that do not make up the {size[0] * size[1]} "
            "pixels of its image; mend or remove the annotation"
        )


def _runs(text: str) -> list[int]:
    """The run lengths in COCO's compressed form; none where it is damaged."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= bits >> 4 << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [] if shift else runs


def masks_of(record: ImageRecord) -> dict[int, Bool[np.ndarray, "H W"]]:
    """The union of a record's instances per class. InputError for one that cannot be decoded."""
    by_class: dict[int, list[tuple[int | str, Any]]] = {}
    for class_id, number, segmentation in _of_record.decode(record.instances):
        by_class.setdefault(class_id, []).append((number, segmentation))
    masks = {c: _union(parts, record) for c, parts in sorted(by_class.items())}
    # An instance smaller than a pixel gives an empty mask: the image does not show the class.
    return {c: mask for c, mask in masks.items() if mask.any()}


def _union(parts: list[tuple[int | str, Any]], record: ImageRecord) -> Bool[np.ndarray, "H W"]:
    """What `annToMask` gives for each instance, united (the same run-length code, nothing printed)."""
    from pycocotools import mask as rle_code

    runs: list[Any] = []
    for number, segmentation in parts:
        try:
            if isinstance(segmentation, list):
                runs += rle_code.frPyObjects(segmentation, record.height, record.width)
                continue
            rle = {"size": list(segmentation.size), "counts": segmentation.counts}
            runs.append(rle_code.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle)
        except (TypeError, ValueError) as error:
            raise InputError(f"annotation {number} of '{record.image_path}' has no readable mask: {error}") from error
    decoded: Bool[np.ndarray, "H W"] = rle_code.decode(rle_code.merge(runs)).astype(bool)
    return decoded
