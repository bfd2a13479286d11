"""Episodes and training pairs as Arrow tables: rows of the image store, never pixels."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence

import fsspec
import pyarrow as pa

from mshnet.data.episodes import Episode
from mshnet.data.files import write_atomically
from mshnet.data.splits import Pair
from mshnet.data.store import ImageStore

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


def write_episodes(uri: str, store: ImageStore, fold: int, shot: int, splits: Mapping[str, Sequence[Episode]]) -> None:
    """One table of all splits' episodes, in order."""
    rows = [
        {
            "episode_id": i,
            "fold": fold,
            "split": split,
            "shot": shot,
            "class_id": episode.class_id,
            "query_row": store.row(episode.query),
            "support_rows": [store.row(image_id) for image_id in episode.supports],
        }
        for split, episodes in splits.items()
        for i, episode in enumerate(episodes)
    ]
    _write(uri, rows, EPISODE_SCHEMA)


def read_episodes(uri: str, store: ImageStore, split: str) -> list[Episode]:
    """The episodes of one split, in order."""
    ids = store.image_ids
    return [
        Episode(ids[row["query_row"]], tuple(ids[i] for i in row["support_rows"]), row["class_id"])
        for row in _read(uri).to_pylist()
        if row["split"] == split
    ]


def write_pairs(uri: str, store: ImageStore, pairs: Sequence[Pair]) -> None:
    """The (image, class) pairs that training draws from, in order."""
    _write(uri, [{"image_row": store.row(i), "class_id": c} for i, c in pairs], PAIR_SCHEMA)


def read_pairs(uri: str, store: ImageStore) -> list[Pair]:
    """What `write_pairs` wrote."""
    return [(store.image_ids[row["image_row"]], row["class_id"]) for row in _read(uri).to_pylist()]


def _write(uri: str, rows: Sequence[Mapping[str, object]], schema: pa.Schema) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))
    write_atomically(uri, memoryview(sink.getvalue()))


def _read(uri: str) -> pa.Table:
    fs, path = fsspec.core.url_to_fs(uri)
    return pa.ipc.open_file(pa.BufferReader(fs.cat_file(posixpath.normpath(path)))).read_all()
