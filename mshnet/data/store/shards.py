"""Shard files: uncompressed Arrow IPC, so that they memory-map, in batches of a few rows. Loads no torch."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import posixpath
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from mshnet.data.files import put_file
from mshnet.data.store.manifest import Shard
from mshnet.data.store.rows import SCHEMA, crc32, labels_crc32
from mshnet.data.temporary import temporary_room

BATCH_ROWS = 64
"""Of a record batch: what a writer holds in memory at most."""
LABELS = ["image_id", "subset", "height", "width", "class_ids", "pixels"]


class DamagedShardError(Exception):
    """A shard's bytes are not those that were written. The message says which; the reader knows where it lies."""


def write_shard(rows: Iterable[Mapping[str, Any]], folder: str) -> Shard:
    """Write rows as one shard under its content's name; a file of that name already there is the same file.

    Takes rows one by one (a generator will do): memory is bounded by a batch, whatever their number. Raises InputError
    where the temporary folder, in which it is made, is full.
    """
    count = 0
    remaining = iter(rows)
    # Without a name, so that a process that is killed leaves nothing of it; without a buffer, so that nothing is left
    # to be written, and to fail, when it is closed.
    with tempfile.TemporaryFile(buffering=0) as file:
        sink = _HashedFile(file)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), SCHEMA) as writer:
            while chunk := list(itertools.islice(remaining, BATCH_ROWS)):
                writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=SCHEMA))
                count += len(chunk)
        digest = sink.sha256.hexdigest()
        shard = Shard(name=f"images-{digest[:16]}.arrow", sha256=digest, rows=count, size_bytes=file.tell())
        put_file(f"/dev/fd/{file.fileno()}", posixpath.join(folder, shard.name))
    return shard


class _HashedFile:
    """A file that is hashed as it is written."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: pa.Buffer | bytes) -> int:
        self.sha256.update(data)
        left = memoryview(data)
        with temporary_room("a shard"):
            while left:
                left = left[self._file.write(left) :]
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Left to whoever opened it."""


@dataclass(frozen=True)
class EncodedRow:
    """What a row holds of pixels, still compressed, as checked against its crc32."""

    image: bytearray
    masks: dict[int, bytes]
    """By class id."""
    ignore: bytes
    """Empty where the data set has no such label."""


def map_shard(path: str, shard: Shard) -> mmap.mmap:
    """A local shard in memory. Raises DamagedShardError where it has another size."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != shard.size_bytes:
            raise DamagedShardError(f"expected {shard.size_bytes} bytes, found {size}")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_labels(file: Any, rows: int) -> list[dict[str, Any]]:
    """What each row of a shard says in words and numbers (LABELS), checked; the pixels are not read.

    Raises DamagedShardError where it is not what was written.
    """
    labels: list[dict[str, Any]] = _table(file, rows, [*LABELS, "labels_crc32"]).to_pylist()
    for i, row in enumerate(labels):
        _compare(row.pop("labels_crc32"), labels_crc32(row), i)
    return labels


class ShardIndex:
    """Where each row's parts lie in a shard file, so that reading one needs neither Arrow nor the other rows.

    Raises DamagedShardError for a file that is no such shard.
    """

    def __init__(self, data: mmap.mmap, rows: int) -> None:
        table = _table(data, rows, ["class_ids", "crc32", "image", "masks", "ignore"])
        begin = pa.py_buffer(data).address
        # Copies, so that no mapping is kept by its index.
        self._crc32 = table["crc32"].to_numpy().copy()
        self._images, self._ignores = (_spans(table[name].chunks, begin) for name in ("image", "ignore"))
        self._masks = _spans([values.flatten() for values in table["masks"].chunks], begin)
        self._class_ids = pc.list_flatten(table["class_ids"]).to_numpy().copy()
        self._first = np.concatenate([[0], np.cumsum(pc.list_value_length(table["class_ids"]).to_numpy())])
        if len(self._masks) != len(self._class_ids):
            raise DamagedShardError(f"expected {len(self._class_ids)} masks, found {len(self._masks)}")

    def read(self, data: mmap.mmap, row: int) -> EncodedRow:
        """A row's bytes, checked. Raises DamagedShardError where they are not those that were written."""
        mine = slice(self._first[row], self._first[row + 1])
        class_ids = self._class_ids[mine].tolist()
        start, stop = self._images[row].tolist()
        image = bytearray(memoryview(data)[start:stop])  # torch wants memory that it may write to
        masks = [data[start:stop] for start, stop in self._masks[mine].tolist()]
        start, stop = self._ignores[row].tolist()
        ignore = data[start:stop]
        _compare(int(self._crc32[row]), crc32(class_ids, [image, *masks, ignore]), row)
        return EncodedRow(image, dict(zip(class_ids, masks, strict=True)), ignore)


def _compare(expected: int, found: int, row: int) -> None:
    if found != expected:
        raise DamagedShardError(f"expected crc32 {expected:08x} in row {row}, found {found:08x}")


def _table(file: Any, rows: int, names: list[str]) -> pa.Table:
    """Columns of a shard: of a map without a copy, of an open file reading these columns only."""
    try:
        if isinstance(file, mmap.mmap):
            table = pa.ipc.open_file(pa.py_buffer(file)).read_all().select(names)
        else:
            source = pa.PythonFile(file, mode="r")
            schema = pa.ipc.open_file(source).schema
            # Of a map it would copy.
            options = pa.ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in names])
            table = pa.ipc.open_file(source, options=options).read_all()
        table.validate(full=True)  # that no offset points out of the file
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        if isinstance(error, OSError) and type(error) is not OSError:
            raise  # not Arrow's: the file cannot be read at the moment
        raise DamagedShardError(f"expected an Arrow file with {', '.join(names)}, found another ({error})") from error
    if not table.schema.equals(pa.schema([SCHEMA.field(name) for name in names])):
        raise DamagedShardError(f"expected columns of other types, found {table.schema}")
    if table.num_rows != rows:
        raise DamagedShardError(f"expected {rows} rows, found {table.num_rows}")
    for name in names:
        values = pc.list_flatten(table[name]) if pa.types.is_list(table[name].type) else table[name]
        if name != "ignore" and (values.null_count or table[name].null_count):
            raise DamagedShardError(f"expected {name} in each row, found nulls")
    return table


def _spans(chunks: list[pa.Array], begin: int) -> Int64[np.ndarray, "n 2"]:
    """Where the values of a binary column begin and end, counted from the address `begin`."""
    spans = [np.empty((0, 2), dtype=np.int64)]
    for values in chunks:
        _, offsets, data = values.buffers()
        ends = np.frombuffer(offsets, dtype=np.int32, count=len(values) + 1).astype(np.int64)
        ends += data.address - begin if data else 0
        spans.append(np.stack([ends[:-1], ends[1:]], axis=1))
    return np.concatenate(spans)
