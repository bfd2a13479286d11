"""What a batch prediction leaves: tables of what was found, one for each part of the queries, beside the masks.

OUT/settings.json         what it is of: model, classes, settings; another's results do not mix with it
OUT/inputs/KEY/           the model and the classes as the tasks read them, wherever they run
OUT/parts/NNNNN-KEY.arrow a row for each query and class (SCHEMA); its .json is written last and says that it is whole
OUT/masks/QUERY.png       0 and 255 for one class, else the classes' numbers
OUT/overlays/QUERY.png    with --overlay
OUT/predictions.json      written last: which parts there are
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from mshnet.errors import InputError
from pipelines import storage

FORMAT_VERSION = 1
SETTINGS, MANIFEST = "settings.json", "predictions.json"
INPUTS, PARTS, MASKS, OVERLAYS = "inputs", "parts", "masks", "overlays"
READERS = 16
"""Threads that read small files of a remote place."""
SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),  # path below the queries' folder
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),  # as the listing had it: ETag, or time of change
        pa.field("sha256", pa.string()),  # of the bytes that were read
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("class", pa.string()),
        pa.field("threshold", pa.float32()),
        pa.field("pixels", pa.int64()),
        pa.field("mean_probability", pa.float32()),  # over the class's pixels; null where there is none
        pa.field("rle", pa.string()),  # COCO's compressed counts; the size is height and width
        pa.field("mask", pa.string()),  # path below OUT
        pa.field("error", pa.string()),  # why the query could not be read; then all else is null
    ]
)


@dataclass(frozen=True, order=True)
class Query:
    """A picture as a listing has it."""

    path: str
    """Below the queries' folder."""
    size_bytes: int
    version: str
    """ETag, or time of change: another one is another picture."""


def rle(mask: Bool[np.ndarray, "H W"]) -> str:
    """COCO's compressed run lengths of a mask (column by column); `pycocotools.mask.decode` takes them back."""
    from pycocotools import mask as coco

    return str(coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode())


def table_bytes(rows: Iterable[Mapping[str, Any]], key: str) -> bytes:
    """Rows of SCHEMA as an Arrow IPC file whose metadata names the prediction's key."""
    schema = SCHEMA.with_metadata({"key": key})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))
    return sink.getvalue()


def finished(out: str) -> list[Mapping[str, Any]]:
    """The parts that are whole, in order of their names."""
    folder = storage.join(out, PARTS)
    sizes = storage.sizes(folder)
    names = sorted(name for name in sizes if name.endswith(".json"))
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: storage.read_json(storage.join(folder, name)), names)
        return [part for part in found if part and sizes.get(part["name"]) == part["size_bytes"]]


def done_queries(parts: Iterable[Mapping[str, Any]]) -> set[Query]:
    """All that parts hold."""
    return {Query(*query) for part in parts for query in part["queries"]}


def read_predictions(out: str) -> pa.Table:
    """All rows of a finished prediction (SCHEMA), each query once: as it was segmented last.

    Raises InputError where no prediction was finished there, or a part is not as it was written.
    """
    manifest = storage.read_json(storage.join(out, MANIFEST))
    if manifest is None:
        raise InputError(f"expected a finished prediction in {out!r} (looked for {MANIFEST}); run predict.py first")
    tables = [_table(out, part) for part in manifest["parts"]]
    if not tables:
        return SCHEMA.empty_table()
    latest: dict[str, int] = {}
    for number, table in enumerate(tables):
        latest.update(dict.fromkeys(table["query"].to_pylist(), number))
    kept = [
        table.filter(pa.array([latest[path] == number for path in table["query"].to_pylist()], pa.bool_()))
        for number, table in enumerate(tables)
    ]
    return pa.concat_tables(kept)


def _table(out: str, part: Mapping[str, Any]) -> pa.Table:
    import hashlib

    uri = storage.join(out, PARTS, part["name"])
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != part["sha256"]:
        raise InputError(
            f"expected {uri!r} as it was written, found other bytes; delete it and its .json, and predict again"
        )
    return pa.ipc.open_file(pa.py_buffer(data)).read_all().replace_schema_metadata(None)


def by_parts(queries: Sequence[Query], images_per_part: int) -> list[Sequence[Query]]:
    """Runs of queries of that many at most."""
    return [queries[start : start + images_per_part] for start in range(0, len(queries), images_per_part)]
