"""What a source holds: read once, by one task, into slices that the shard tasks read.

The COCO annotation files are parsed here and nowhere else; a record holds all that its image's masks are made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa

from mshnet.data.files import write_atomically
from mshnet.errors import InputError
from pipelines import dag, own_folds, storage
from pipelines.config import CrossValidationConfig, fingerprint

if TYPE_CHECKING:
    from mshnet.data.source import ImageRecord, Source

CODE_VERSION = 1
"""Raise it when the same source would give other records."""
SCAN = "scan.json"
SLICE_RECORDS = 500
"""Records in one file: what a shard task holds at a time."""
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("subset", pa.string()),
        ("image_path", pa.string()),
        ("mask_path", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("instances", pa.binary()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a source holds, seen without opening a picture."""

    fingerprint: str
    images: int
    class_names: tuple[str, ...]
    mask_mode: str


UNKNOWN = Scan(fingerprint="", images=1, class_names=(), mask_mode="")
"""Stands for a source before it is scanned, where only the graph's shape is asked for."""


def check(config: CrossValidationConfig) -> None:
    """Look whether the source is there; with generated data, generate it first where it is not.

    Raises DatasetNotFoundError or InputError for a source that is absent or of another layout.
    """
    if config.dataset == "shapes":
        from mshnet.data.shapes import is_generated, write_voc

        if "://" in config.source:
            raise InputError(f"generated pictures are written to a local folder, got {config.source!r}; give a path")
        if not is_generated(config.source):
            write_voc(config.source)
    source = opened(config)
    storage.check_readable(config.source)
    source.check()
    own_folds.check(config)


def opened(config: CrossValidationConfig) -> Source:
    """The reader of the configuration's data set; nothing is looked at yet. InputError where flags are missing."""
    from mshnet.data.source import open_source

    return open_source(config.dataset, config.source, config.own)


def scan(config: CrossValidationConfig, record: bool = True) -> Scan:
    """List the source in a Ray task, so that neither the listing nor the annotations ever lie in the driver.

    The records are kept on the store for the shard tasks, unless `record` is False (a dry run).
    Raises InputError for a source whose parts do not fit together.
    """
    found: Scan
    (found,) = dag.each(scan_source, [(config, record)], "scan")
    own_folds.check_classes(config, found.class_names)
    return found


def scan_source(config: CrossValidationConfig, record: bool = True) -> Scan:
    """The task's body. Nothing is parsed where `scan.json` is there already."""
    source = opened(config)
    digest = source.fingerprint()
    folder = _folder(config, digest)
    known = storage.read_json(storage.join(folder, SCAN))
    if known is not None:
        return Scan(
            fingerprint=known["fingerprint"],
            images=known["images"],
            class_names=tuple(known["class_names"]),
            mask_mode=known["mask_mode"],
        )
    images = 0
    slices: list[str] = []
    records = iter(source.records())
    while chunk := list(islice(records, SLICE_RECORDS)):
        images += len(chunk)
        if record:
            slices.append(_write_slice(storage.join(folder, f"{len(slices):05d}.arrow"), chunk))
    if images == 0:
        raise InputError(f"expected labelled images under {config.source!r}, found none")
    found = Scan(fingerprint=digest, images=images, class_names=source.class_names, mask_mode=source.mask_mode)
    if record:
        storage.write_json(storage.join(folder, SCAN), {**asdict(found), "slices": slices})
    return found


def read_records(config: CrossValidationConfig, scanned: Scan, start: int, stop: int) -> Iterator[ImageRecord]:
    """Records start..stop-1 of a scanned source, a slice in memory at a time.

    Raises InputError for a slice that is not what the scan wrote.
    """
    from mshnet.data.source import ImageRecord

    folder = _folder(config, scanned.fingerprint)
    slices = (storage.read_json(storage.join(folder, SCAN)) or {}).get("slices", [])
    for number in range(start // SLICE_RECORDS, (stop - 1) // SLICE_RECORDS + 1):
        uri = storage.join(folder, f"{number:05d}.arrow")
        data = storage.read_bytes(uri) if storage.exists(uri) else b""
        if number >= len(slices) or hashlib.sha256(data).hexdigest() != slices[number]:
            raise InputError(
                f"expected {uri!r} as the scan wrote it, found another; delete {folder!r} and submit again"
            )
        first = number * SLICE_RECORDS
        begin, end = max(start - first, 0), min(stop - first, SLICE_RECORDS)
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        for row in table.slice(begin, end - begin).to_pylist():
            yield ImageRecord(**row)


def _folder(config: CrossValidationConfig, source_fingerprint: str) -> str:
    key = fingerprint("scan", CODE_VERSION, SLICE_RECORDS, source_fingerprint)
    return storage.join(config.store, "scans", f"{config.dataset}-{key}")


def _write_slice(uri: str, records: list[ImageRecord]) -> str:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([asdict(record) for record in records], schema=SCHEMA)
    # Polygons are text: compressed they are a third.
    with pa.ipc.new_file(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    write_atomically(uri, data)
    return hashlib.sha256(data).hexdigest()
