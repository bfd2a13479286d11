"""The episode store's images, read by row.

A row is one image at training size with one lossless mask per class at original size; masks of
different classes may overlap. How the files are laid out: docs/episode_store.md.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import mmap
import posixpath
from collections.abc import Iterable, Sequence
from typing import Any

import fsspec
import pyarrow as pa
from jaxtyping import UInt8
from torch import Tensor

from mshnet.data import decode
from mshnet.data.filesystem import filesystem, is_local
from mshnet.data.manifest import MANIFEST, Manifest, Shard
from mshnet.data.rows import SCHEMA, encode_row
from mshnet.data.shards import DamagedShardError, EncodedRow, ShardIndex, write_shard
from mshnet.errors import DatasetNotFoundError, InputError

__all__ = ["MANIFEST", "SCHEMA", "ImageStore", "Manifest", "Shard", "encode_row", "write_shard"]


class ImageStore:
    """Random access to a sealed store by row. Cheap to open, safe to pickle and to use from threads, read-only.

    Opening reads the manifest and looks at the sizes of the shards; each is opened when a row of it is first read.
    What is decoded was checked against the row's crc32.

    Raises DatasetNotFoundError without a manifest, InputError on another schema version and, when it is opened or
    later, for a shard that is missing, of another size or damaged.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        fs, root = filesystem(uri)
        try:
            text = fs.cat_file(posixpath.join(root, MANIFEST)).decode()
        except FileNotFoundError as error:
            raise DatasetNotFoundError(
                f"no episode store under {uri!r} (looked for {MANIFEST}); preprocess first, or finish the preprocessing"
            ) from error
        self.manifest = Manifest.from_json(text, uri)
        sizes = {posixpath.basename(entry["name"]): entry["size"] for entry in fs.ls(root, detail=True)}
        for shard in self.manifest.shards:
            size = sizes.get(shard.name)
            if size != shard.size_bytes:
                raise self._damaged(shard, f"{shard.size_bytes} bytes", "none" if size is None else f"{size} bytes")
        self._begin()

    def _begin(self) -> None:
        self._starts = [0, *itertools.accumulate(shard.rows for shard in self.manifest.shards)]
        self._maps: dict[int, mmap.mmap] = {}
        self._indices: dict[int, ShardIndex] = {}
        self._ids: dict[int, list[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return self._starts[-1]

    def verify(self) -> None:
        """Check every shard's hash. Raises InputError naming the first damaged one."""
        for shard in self.manifest.shards:
            with fsspec.open(posixpath.join(self.uri, shard.name), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                raise self._damaged(shard, f"sha256 {shard.sha256[:12]}…", f"{digest[:12]}…")

    @functools.cached_property
    def image_ids(self) -> Sequence[str]:
        """The id of every image, in row order; read when first asked for."""
        return [image_id for number in range(len(self.manifest.shards)) for image_id in self._ids_of(number)]

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    def image_id(self, row: int) -> str:
        """The id of one image; reads those of its shard only."""
        number, i = self._locate(row)
        return self._ids_of(number)[i]

    def row(self, image_id: str) -> int:
        """The row of an image. Raises InputError for one that the store does not hold."""
        try:
            return self._rows[image_id]
        except KeyError:
            raise InputError(
                f"expected image {image_id!r} in the store {self.uri!r}, found none of that name among {len(self)}; "
                "give split lists made for this source"
            ) from None

    def contents(self) -> list[tuple[str, str, dict[int, int]]]:
        """(image id, subset, original pixels per class) of every image, in row order."""
        return [
            (r["image_id"], r["subset"], dict(zip(r["class_ids"], r["pixels"], strict=True)))
            for number in range(len(self.manifest.shards))
            for r in self._columns(number, ["image_id", "subset", "class_ids", "pixels"]).to_pylist()
        ]

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds a row."""
        return self._locate(row)[0]

    def read_ahead(self, rows: Iterable[int]) -> None:
        """Fetch the shards of the rows into the node's cache, in order of first use, as many as fit; does not wait."""

    def image(self, row: int) -> UInt8[Tensor, "3 S S"]:
        """The picture at training size, RGB."""
        return decode.picture(self._read(row))

    def mask(self, row: int, class_id: int, with_ignore: bool = False) -> UInt8[Tensor, "S S"]:
        """1 where the class is, 0 elsewhere, at training size by nearest neighbour from the original.

        With `with_ignore`, 255 where the data set says so. An image without the class gives zeros.
        """
        return decode.mask(self._read(row), class_id, self.manifest.format.image_size_px, with_ignore)

    def _read(self, row: int) -> EncodedRow:
        number, i = self._locate(row)
        shard = self.manifest.shards[number]
        try:
            return self._index(number).read(self._map(number), i)
        except DamagedShardError as error:
            raise self._damaged(shard, "it as it was written", str(error)) from error

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row must be 0..{len(self) - 1}, got {row}")
        number = bisect.bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]

    # Two threads that open the same shard at once both do so, and one is dropped: that needs no lock.

    def _index(self, number: int) -> ShardIndex:
        if number not in self._indices:
            self._indices[number] = ShardIndex(self._map(number), self.manifest.shards[number].rows)
        return self._indices[number]

    def _map(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            uri = posixpath.join(self.uri, self.manifest.shards[number].name)
            path = filesystem(uri)[1] if is_local(uri) else fsspec.open_local(f"simplecache::{uri}")
            with open(path, "rb") as file:
                self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[number]

    def _ids_of(self, number: int) -> list[str]:
        if number not in self._ids:
            self._ids[number] = self._columns(number, ["image_id"]).column("image_id").to_pylist()
        return self._ids[number]

    def _columns(self, number: int, names: list[str]) -> pa.Table:
        reader = pa.ipc.open_file(pa.py_buffer(self._map(number)))
        batches = [reader.get_batch(i).select(names) for i in range(reader.num_record_batches)]
        return pa.Table.from_batches(batches, pa.schema([SCHEMA.field(name) for name in names]))

    def _damaged(self, shard: Shard, expected: str, found: str) -> InputError:
        return InputError(
            f"expected shard {shard.name} of {expected}, found {found} in {self.uri!r}; "
            "mend it with `python -m pipelines.preprocess --repair`"
        )
