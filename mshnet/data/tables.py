"""Episodes and training pairs as Arrow tables: rows of the image store, never pixels.

Writing gives the file's SHA-256, reading asks for it: a table that was altered is refused.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mshnet.data.episodes import Episode, NumberedPairs
from mshnet.data.files import write_atomically
from mshnet.data.filesystem import filesystem
from mshnet.data.splits import Pair
from mshnet.data.store.images import ImageStore
from mshnet.errors import InputError

EPISODE_SCHEMA = pa.schema(
    [
        ("episode_id", pa.int32()),
        ("fold", pa.int32()),
        ("split", pa.string()),
        ("shot", pa.int32()),
        ("class_id", pa.int32()),
        ("query_row", pa.int32()),
        ("support_rows", pa.list_(pa.int32())),
    ]
)
PAIR_SCHEMA = pa.schema([("image_row", pa.int32()), ("class_id", pa.int32())])


def write_episodes(uri: str, store: ImageStore, fold: int, splits: Mapping[str, Sequence[Episode[str]]]) -> str:
    """One table of all splits' episodes, in order, of whatever shots; gives its SHA-256."""
    rows = [
        {
            "episode_id": i,
            "fold": fold,
            "split": split,
            "shot": len(episode.supports),
            "class_id": episode.class_id,
            "query_row": store.row(episode.query),
            "support_rows": [store.row(image_id) for image_id in episode.supports],
        }
        for split, episodes in splits.items()
        for i, episode in enumerate(episodes)
    ]
    return _write(uri, pa.Table.from_pylist(rows, schema=EPISODE_SCHEMA))


def read_episodes(uri: str, sha256: str, split: str) -> list[Episode[int]]:
    """The episodes of one split by row, in order. Raises InputError when the table is not as it was written."""
    table = _read(uri, sha256)
    table = table.filter(pc.equal(table["split"], split))
    columns = (table[name].to_pylist() for name in ("query_row", "support_rows", "class_id"))
    return [Episode(query, tuple(supports), class_id) for query, supports, class_id in zip(*columns, strict=True)]


def write_pairs(uri: str, store: ImageStore, pairs: Sequence[Pair]) -> str:
    """The (image, class) pairs that training draws from, in order; gives the table's SHA-256."""
    columns = [np.array([store.row(i) for i, _ in pairs], np.int32), np.array([c for _, c in pairs], np.int32)]
    return _write(uri, pa.table(columns, schema=PAIR_SCHEMA))


def read_pairs(uri: str, sha256: str) -> NumberedPairs:
    """What `write_pairs` wrote, by row: 8 bytes a pair. Raises InputError when the table is not as it was written."""
    table = _read(uri, sha256)
    return NumberedPairs(table["image_row"].to_numpy(), table["class_id"].to_numpy())


def _write(uri: str, table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = memoryview(sink.getvalue())
    write_atomically(uri, data)
    return hashlib.sha256(data).hexdigest()


def _read(uri: str, sha256: str) -> pa.Table:
    fs, path = filesystem(uri)
    data = fs.cat_file(path)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise InputError(
            f"expected the table {uri!r} as it was drawn, with sha256 {sha256[:12]}…, found {found[:12]}…: it was "
            f"altered or damaged since; delete the folder {posixpath.dirname(uri)!r} and submit the job again"
        )
    return pa.ipc.open_file(pa.BufferReader(data)).read_all()
