"""Every test episode's counts as a table: what statistics, comparisons and galleries are made of."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from mshnet.data.files import write_atomically
from mshnet.data.filesystem import filesystem
from mshnet.errors import InputError
from mshnet.metrics import Counts

SCHEMA = pa.schema(
    [
        ("predictor", pa.string()),
        ("shot", pa.int32()),
        ("seed", pa.int64()),
        ("episode", pa.int32()),
        ("query", pa.string()),
        ("class_id", pa.int32()),
        ("background_intersection", pa.int64()),
        ("foreground_intersection", pa.int64()),
        ("background_union", pa.int64()),
        ("foreground_union", pa.int64()),
        ("object_px", pa.int64()),
        ("counted_px", pa.int64()),
    ]
)
"""A row per predictor and episode, in the lists' order."""


@dataclass(frozen=True)
class Outcomes:
    """One way of segmenting on n episodes, in order."""

    counts: Counts
    """Arrays of shape (n, 2)."""
    class_ids: Int64[np.ndarray, " n"]
    object_px: Int64[np.ndarray, " n"]
    """Of the true object that count."""
    counted_px: Int64[np.ndarray, " n"]
    """Of the query that count: all but the ignored."""

    def __len__(self) -> int:
        return len(self.class_ids)


@dataclass(frozen=True)
class Judged:
    """One way of segmenting on one list of test episodes."""

    predictor: str
    """trained, or a baseline's name."""
    shot: int
    seed: int
    """Of the list's draw."""
    queries: tuple[str, ...]
    """Image ids, an episode each."""
    outcomes: Outcomes

    def __post_init__(self) -> None:
        if len(self.queries) != len(self.outcomes):
            raise InputError(f"expected a query per episode, got {len(self.queries)} and {len(self.outcomes)}")


def write_outcomes(uri: str, judged: Sequence[Judged]) -> str:
    """One table of all of them, in order, never readable half-written; gives its SHA-256."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for each in judged:
            writer.write_table(_table(each))
    data = memoryview(sink.getvalue())
    write_atomically(uri, data)
    return hashlib.sha256(data).hexdigest()


def read_outcomes(uri: str, sha256: str = "") -> list[Judged]:
    """What `write_outcomes` wrote, in order; with a SHA-256 it is checked.

    Raises InputError where the table is not as it was written, FileNotFoundError where there is none.
    """
    fs, path = filesystem(uri)
    data = fs.cat_file(path)
    found = hashlib.sha256(data).hexdigest()
    if sha256 and found != sha256:
        raise InputError(
            f"expected the episodes' outcomes {uri!r} as they were judged, with sha256 {sha256[:12]}…, found "
            f"{found[:12]}…: they were altered or damaged since; delete the folder that holds them and evaluate again"
        )
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    except pa.ArrowException as error:
        raise InputError(f"expected a table of outcomes in {uri!r}, found another file: {error}") from error
    if not table.schema.equals(SCHEMA):
        raise InputError(f"expected a table of outcomes in {uri!r}, found columns {table.schema.names}")
    return _split(table)


def _table(judged: Judged) -> pa.Table:
    outcomes, n = judged.outcomes, len(judged.queries)
    columns = {
        "predictor": [judged.predictor] * n,
        "shot": [judged.shot] * n,
        "seed": [judged.seed] * n,
        "episode": range(n),
        "query": judged.queries,
        "class_id": outcomes.class_ids,
        "background_intersection": outcomes.counts.intersection[:, 0],
        "foreground_intersection": outcomes.counts.intersection[:, 1],
        "background_union": outcomes.counts.union[:, 0],
        "foreground_union": outcomes.counts.union[:, 1],
        "object_px": outcomes.object_px,
        "counted_px": outcomes.counted_px,
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def _split(table: pa.Table) -> list[Judged]:
    keys = list(zip(*(table[name].to_pylist() for name in ("predictor", "shot", "seed")), strict=True))
    queries = table["query"].to_pylist()
    numbers = {
        name: table[name].to_numpy().astype(np.int64)
        for name in SCHEMA.names
        if name not in ("predictor", "shot", "seed", "query")
    }
    judged, start = [], 0
    for (predictor, shot, seed), group in itertools.groupby(keys):
        stop = start + len(list(group))
        mine = {name: values[start:stop] for name, values in numbers.items()}
        counts = Counts(
            *(np.stack([mine[f"background_{x}"], mine[f"foreground_{x}"]], axis=1) for x in ("intersection", "union"))
        )
        outcomes = Outcomes(counts, mine["class_id"], mine["object_px"], mine["counted_px"])
        judged.append(Judged(predictor, shot, seed, tuple(queries[start:stop]), outcomes))
        start = stop
    return judged
