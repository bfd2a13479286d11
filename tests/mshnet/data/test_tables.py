"""Episodes and training pairs as Arrow tables: the same lists come back, in order, by the store's rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from mshnet.data.episodes import Episode
from mshnet.data.store import ImageStore
from mshnet.data.tables import (
    EPISODE_SCHEMA,
    PAIR_SCHEMA,
    read_episodes,
    read_pairs,
    write_episodes,
    write_pairs,
)
from mshnet.errors import InputError
from tests.mshnet.data.stored import noise_image, write_store

SPLITS = {
    "validation": [Episode("c", ("a", "d"), 2), Episode("a", ("b", "b"), 0), Episode("c", ("a", "d"), 2)],
    "test": [Episode("d", ("c", "a"), 1)],
}
PAIRS = [("d", 0), ("a", 2), ("d", 2), ("a", 2)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """Rows 0..3 are the images b, a, d, c."""
    images = {name: noise_image(seed) for seed, name in enumerate("badc")}
    return write_store(str(tmp_path_factory.mktemp("store")), images, images_per_shard=2)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_lists_come_back_in_order(scheme: str, store: ImageStore, tmp_path: Path) -> None:
    folder = str(tmp_path) if scheme == "local" else "memory://tables-test/fold0"
    write_episodes(f"{folder}/episodes.arrow", store, fold=3, shot=2, splits=SPLITS)
    for split, episodes in SPLITS.items():
        assert read_episodes(f"{folder}/episodes.arrow", store, split) == episodes
    write_pairs(f"{folder}/pairs.arrow", store, PAIRS)
    assert read_pairs(f"{folder}/pairs.arrow", store) == PAIRS


def test_plain_pyarrow_reads_the_tables(store: ImageStore, tmp_path: Path) -> None:
    write_episodes(str(tmp_path / "episodes.arrow"), store, fold=3, shot=2, splits=SPLITS)
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "episodes.arrow"))).read_all()
    assert table.schema == EPISODE_SCHEMA
    assert table.to_pydict() == {
        "episode_id": [0, 1, 2, 0],  # counted within a split
        "fold": [3] * 4,
        "split": ["validation"] * 3 + ["test"],
        "shot": [2] * 4,
        "class_id": [2, 0, 2, 1],
        "query_row": [3, 1, 3, 2],
        "support_rows": [[1, 2], [0, 0], [1, 2], [3, 1]],
    }
    write_pairs(str(tmp_path / "pairs.arrow"), store, PAIRS)
    pairs = pa.ipc.open_file(pa.memory_map(str(tmp_path / "pairs.arrow"))).read_all()
    assert pairs.schema == PAIR_SCHEMA
    assert pairs.to_pydict() == {"image_row": [2, 1, 2, 1], "class_id": [0, 2, 2, 2]}


def test_the_same_lists_give_the_same_bytes(store: ImageStore, tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_pairs(str(tmp_path / name), store, PAIRS)
    write_pairs(str(tmp_path / "3"), store, PAIRS[::-1])
    first, again, other = ((tmp_path / name).read_bytes() for name in "123")
    assert first == again
    assert first != other


def test_nothing_is_a_list_too(store: ImageStore, tmp_path: Path) -> None:
    write_episodes(str(tmp_path / "e"), store, fold=0, shot=1, splits={"test": []})
    write_pairs(str(tmp_path / "p"), store, [])
    assert (read_episodes(str(tmp_path / "e"), store, "test"), read_pairs(str(tmp_path / "p"), store)) == ([], [])


def test_an_image_that_the_store_does_not_hold(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected image 'z' in the store"):
        write_pairs(str(tmp_path / "p"), store, [("a", 0), ("z", 1)])
    with pytest.raises(InputError, match="expected image 'z' in the store"):
        write_episodes(str(tmp_path / "e"), store, fold=0, shot=1, splits={"test": [Episode("a", ("z",), 0)]})
    assert list(tmp_path.iterdir()) == []  # nothing half-written
