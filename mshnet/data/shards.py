"""Shard files: uncompressed Arrow IPC, so that they memory-map, in batches of a few rows. Loads no torch."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import posixpath
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from mshnet.data.files import put_file
from mshnet.data.manifest import Shard
from mshnet.data.rows import SCHEMA, crc32

BATCH_ROWS = 64
"""Of a record batch: what a writer holds in memory at most."""


class DamagedShardError(Exception):
    """A shard's bytes are not those that were written. The message says which; the reader knows where it lies."""


def write_shard(rows: Iterable[Mapping[str, Any]], folder: str) -> Shard:
    """Write rows as one shard under its content's name; a file of that name already there is the same file.

    Takes rows one by one (a generator will do): memory is bounded by a batch, whatever their number.
    """
    count = 0
    remaining = iter(rows)
    # Without a name, so that a process that is killed leaves nothing of it.
    with tempfile.TemporaryFile() as file:
        sink = _HashedFile(file)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), SCHEMA) as writer:
            while chunk := list(itertools.islice(remaining, BATCH_ROWS)):
                writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=SCHEMA))
                count += len(chunk)
        file.flush()
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
        return self._file.write(data)

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


class ShardIndex:
    """Where each row's parts lie in a shard file, so that reading one needs neither Arrow nor the other rows.

    Raises DamagedShardError for a file that is no such shard.
    """

    def __init__(self, data: mmap.mmap, rows: int) -> None:
        try:
            buffer = pa.py_buffer(data)
            reader = pa.ipc.open_file(buffer)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)  # that no offset points out of the file
            found = sum(batch.num_rows for batch in batches)
        except pa.ArrowInvalid as error:
            raise DamagedShardError(f"expected an Arrow file, found something else ({error})") from error
        if found != rows:
            raise DamagedShardError(f"expected {rows} rows, found {found}")

        def column(name: str) -> list[pa.Array]:
            return [batch.column(name) for batch in batches]

        self._crc32 = np.concatenate([values.to_numpy() for values in column("crc32")])
        self._images = _joined(_spans(values, buffer) for values in column("image"))
        self._ignores = _joined(_spans(values, buffer) for values in column("ignore"))
        self._masks = _joined(_spans(values.flatten(), buffer) for values in column("masks"))
        self._class_ids = np.concatenate([values.flatten().to_numpy() for values in column("class_ids")])
        classes = np.concatenate([values.value_lengths().to_numpy() for values in column("class_ids")])
        self._first = np.concatenate([[0], np.cumsum(classes)])
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
        expected, found = int(self._crc32[row]), crc32(class_ids, [image, *masks, ignore])
        if found != expected:
            raise DamagedShardError(f"expected crc32 {expected:08x} in row {row}, found {found:08x}")
        return EncodedRow(image, dict(zip(class_ids, masks, strict=True)), ignore)


def _spans(values: pa.Array, file: pa.Buffer) -> Int64[np.ndarray, "n 2"]:
    """Where the values of a binary column begin and end in the file."""
    _, offsets, data = values.buffers()
    if data is None:
        return np.zeros((len(values), 2), dtype=np.int64)
    ends = np.frombuffer(offsets, dtype=np.int32)[: len(values) + 1].astype(np.int64) + (data.address - file.address)
    return np.stack([ends[:-1], ends[1:]], axis=1)


def _joined(spans: Iterable[Int64[np.ndarray, "n 2"]]) -> Int64[np.ndarray, "m 2"]:
    return np.concatenate([np.empty((0, 2), dtype=np.int64), *spans])
