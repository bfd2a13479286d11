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
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from mshnet.data.filesystem import filesystem, is_local
from mshnet.data.store import decode
from mshnet.data.store.cache import NodeCache
from mshnet.data.store.manifest import MANIFEST, Manifest, Shard
from mshnet.data.store.read_ahead import read_ahead
from mshnet.data.store.shards import DamagedShardError, EncodedRow, ShardIndex, map_shard, read_labels
from mshnet.errors import DatasetNotFoundError, InputError

T = TypeVar("T")
_REQUESTS = 8
"""Side by side, where each is small."""
_MAPS = 256
"""Kept of a local store; each holds a file open, of which a process may have a thousand or so."""


class ImageStore:
    """Random access to a sealed store by row. Cheap to open, safe to pickle and to use from threads, read-only.

    Opening reads the manifest and looks at the sizes of the shards; each is opened when a row of it is first read: in
    place where the store is local, else in the node's cache (`mshnet.data.store.cache`). What is given out was checked.

    Raises DatasetNotFoundError without a manifest, InputError for a damaged one or another schema version and, when it
    is opened or later, for a shard that is missing, of another size or damaged (looked for twice).
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        fs, root = filesystem(uri)
        try:
            text = fs.cat_file(posixpath.join(root, MANIFEST))
        except FileNotFoundError as error:
            raise DatasetNotFoundError(
                f"no episode store under {uri!r} (looked for {MANIFEST}); preprocess first, or finish the preprocessing"
            ) from error
        self.manifest = Manifest.from_json(text, uri)
        sizes = {posixpath.basename(entry["name"]): entry["size"] for entry in fs.ls(root, detail=True)}
        for shard in self.manifest.shards:
            if sizes.get(shard.name) != shard.size_bytes:
                found = f"{sizes[shard.name]}" if shard.name in sizes else "none"
                raise self._damaged(shard, f"expected {shard.size_bytes} bytes, found {found}")
        self._begin()

    def _begin(self) -> None:
        self._side = self.manifest.format.image_size_px
        self._starts = [0, *itertools.accumulate(shard.rows for shard in self.manifest.shards)]
        self._cache = None if is_local(self.uri) else NodeCache.from_environment()
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()  # of a local store, the last used last
        self._indices: dict[int, ShardIndex] = {}
        self._ids: dict[int, list[str]] = {}
        self._sizes: dict[int, list[tuple[int, int]]] = {}
        self._end_of_reading_ahead: Callable[[], object] = bool

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return self._starts[-1]

    def verify(self) -> None:
        """Check the hash of every shard of a local store; a remote one's are when they arrive.

        Raises InputError naming the first damaged one.
        """
        if self._cache is not None:
            return
        for shard in self.manifest.shards:
            fs, path = filesystem(posixpath.join(self.uri, shard.name))
            with fs.open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                raise self._damaged(shard, f"expected sha256 {shard.sha256[:12]}…, found {digest[:12]}…")

    @functools.cached_property
    def image_ids(self) -> list[str]:
        """The id of every image, in row order; read when first asked for."""
        return [image_id for image_id, _, _ in self._contents]

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    def image_id(self, row: int) -> str:
        """The id of one image; reads those of its shard only."""
        number, i = self._locate(row)
        if number not in self._ids:
            self._ids[number] = [labels["image_id"] for labels in self._labels(number)]
        return self._ids[number][i]

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
        """(image id, subset, original pixels per class) of every image, in row order. Reads no pixels.

        Read when first asked for and kept: leave the list as it is.
        """
        return self._contents

    @functools.cached_property
    def _contents(self) -> list[tuple[str, str, dict[int, int]]]:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return [
                (row["image_id"], row["subset"], dict(zip(row["class_ids"], row["pixels"], strict=True)))
                for labels in pool.map(self._labels, range(len(self.manifest.shards)))
                for row in labels
            ]

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds a row."""
        return self._locate(row)[0]

    def read_ahead(self, rows: Iterable[int]) -> None:
        """Fetch the shards of a remote store into the node's cache, in order of first use, as many as fit it.

        Returns at once: a thread goes through the rows. What it fails to do is done, or reported, when a row is read.
        """
        if self._cache is None:
            return
        self._end_of_reading_ahead()
        # The thread must not keep the store, whose end is the thread's end.
        uri = self.uri
        shards = _in_order_of_use(self.manifest.shards, self._starts, rows)
        stop = read_ahead(self._cache, ((shard, functools.partial(_fetch, uri, shard)) for shard in shards))
        self._end_of_reading_ahead = weakref.finalize(self, stop.set)

    def image(self, row: int) -> UInt8[Tensor, "3 S S"]:
        """The picture at training size, RGB."""
        return decode.picture(self._read(row))

    def mask(self, row: int, class_id: int, with_ignore: bool = False) -> UInt8[Tensor, "S S"]:
        """1 where the class is, 0 elsewhere, at training size by nearest neighbour from the original.

        With `with_ignore`, 255 where the data set says so. An image without the class gives zeros.
        """
        return decode.mask(self._read(row), class_id, self._side, with_ignore)

    def pixels(
        self, row: int, class_id: int, with_ignore: bool = False
    ) -> tuple[UInt8[Tensor, "3 S S"], UInt8[Tensor, "S S"]]:
        """`image` and `mask` of a row that is read once."""
        encoded = self._read(row)
        return decode.picture(encoded), decode.mask(encoded, class_id, self._side, with_ignore)

    def original_mask(self, row: int, class_id: int, with_ignore: bool = False) -> UInt8[Tensor, "H W"]:
        """`mask` at the image's own size, every pixel as it was annotated."""
        return decode.original(self._read(row), class_id, self.size_px(row), with_ignore)

    def size_px(self, row: int) -> tuple[int, int]:
        """Height and width of the original image; reads its shard's labels."""
        number, i = self._locate(row)
        if number not in self._sizes:
            self._sizes[number] = [(labels["height"], labels["width"]) for labels in self._labels(number)]
        return self._sizes[number][i]

    def read_into(
        self,
        row: int,
        class_id: int,
        image: UInt8[np.ndarray, "S S 3"],
        mask: UInt8[np.ndarray, "S S"],
        with_ignore: bool = False,
    ) -> None:
        """Write `pixels` where they are wanted, the picture pixel by pixel."""
        encoded = self._read(row)
        np.copyto(image, decode.picture(encoded).permute(1, 2, 0).numpy())
        decode.mask_into(mask, encoded, class_id, with_ignore)

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row must be 0..{len(self) - 1}, got {row}")
        number = bisect.bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]

    def _read(self, row: int) -> EncodedRow:
        number, i = self._locate(row)
        shard = self.manifest.shards[number]

        def read() -> EncodedRow:
            data, index = self._map(number), self._indices.get(number)
            if index is None:  # two threads that come here at once both make one: that needs no lock
                index = self._indices[number] = ShardIndex(data, shard.rows)
            return index.read(data, i)

        def forget() -> None:
            self._maps.pop(number, None)
            self._indices.pop(number, None)
            if self._cache is not None:
                self._cache.drop(shard)

        return self._twice(shard, read, forget)

    def _labels(self, number: int) -> list[dict[str, Any]]:
        shard = self.manifest.shards[number]

        def read() -> list[dict[str, Any]]:
            if self._cache is None:
                return read_labels(self._map(number), shard.rows)
            # The small columns alone, by a request per record batch.
            fs, path = filesystem(posixpath.join(self.uri, shard.name))
            with fs.open(path, "rb", block_size=2**16, cache_type="blockcache") as file:
                return read_labels(file, shard.rows)

        return self._twice(shard, read, lambda: self._maps.pop(number, None))

    def _twice(self, shard: Shard, read: Callable[[], T], forget: Callable[[], object]) -> T:
        """What is damaged or missing may be so in this copy only, or may have been mended since it was opened."""
        try:
            return read()
        except (DamagedShardError, FileNotFoundError):
            forget()
        try:
            return read()
        except DamagedShardError as error:
            raise self._damaged(shard, str(error)) from error
        except FileNotFoundError as error:
            raise self._damaged(shard, f"expected {shard.size_bytes} bytes, found none") from error

    def _map(self, number: int) -> mmap.mmap:
        shard = self.manifest.shards[number]
        if self._cache is not None:
            # Not kept: what is evicted must not go on filling the disk.
            return self._cache.map(shard, functools.partial(_fetch, self.uri, shard))
        data = self._maps.pop(number, None) or map_shard(filesystem(posixpath.join(self.uri, shard.name))[1], shard)
        self._maps[number] = data
        while len(self._maps) > _MAPS:
            self._maps.popitem(last=False)
        if data.size() != shard.size_bytes:  # reading on would kill the process
            raise DamagedShardError(f"expected {shard.size_bytes} bytes, found {data.size()}")
        return data

    def _damaged(self, shard: Shard, problem: str) -> InputError:
        return InputError(
            f"{problem} in shard {shard.name} of the store {self.uri!r}; mend it with "
            "`python -m pipelines.preprocess --repair`, with the --dataset, --source and --store it was made with"
        )


def _fetch(uri: str, shard: Shard, local_path: str) -> None:
    fs, path = filesystem(posixpath.join(uri, shard.name))
    fs.get_file(path, local_path)


def _in_order_of_use(shards: Sequence[Shard], starts: Sequence[int], rows: Iterable[int]) -> Iterator[Shard]:
    seen: set[int] = set()
    for row in rows:
        number = bisect.bisect_right(starts, row) - 1
        if number not in seen:
            seen.add(number)
            yield shards[number]
            if len(seen) == len(shards):
                return
