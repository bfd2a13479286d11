"""Episodes and training pairs as Arrow tables: the same lists come back, in order, by the store's rows, or none."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mshnet.data.episodes import Episode
from mshnet.data.store.images import ImageStore
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
ROWS_OF_PAIRS = ([2, 1, 2, 1], [0, 2, 2, 2])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """Rows 0..3 are the images b, a, d, c."""
    images = {name: noise_image(seed) for seed, name in enumerate("badc")}
    return write_store(str(tmp_path_factory.mktemp("store")), images, images_per_shard=2)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_lists_come_back_in_order(scheme: str, store: ImageStore, tmp_path: Path) -> None:
    folder = str(tmp_path) if scheme == "local" else "memory://tables-test/fold0"
    sha256 = write_episodes(f"{folder}/episodes.arrow", store, fold=3, splits=SPLITS)
    for split, episodes in SPLITS.items():
        found = read_episodes(f"{folder}/episodes.arrow", sha256, split)
        assert [episode.named(store.image_id) for episode in found] == episodes
    assert read_episodes(f"{folder}/episodes.arrow", sha256, "test") == [Episode(2, (3, 1), 1)]
    sha256 = write_pairs(f"{folder}/pairs.arrow", store, PAIRS)
    pairs = read_pairs(f"{folder}/pairs.arrow", sha256)
    assert (pairs.images.tolist(), pairs.class_ids.tolist()) == ROWS_OF_PAIRS
    assert pairs.images.dtype == pairs.class_ids.dtype == np.int32  # 8 bytes a pair


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_an_altered_table_is_refused_by_name(scheme: str, store: ImageStore, tmp_path: Path) -> None:
    folder = str(tmp_path) if scheme == "local" else "memory://tables-test/altered"
    episodes, pairs = f"{folder}/episodes.arrow", f"{folder}/pairs.arrow"
    of_episodes = write_episodes(episodes, store, fold=3, splits=SPLITS)
    of_pairs = write_pairs(pairs, store, PAIRS)
    # Tables as good as the first ones, of something else.
    write_episodes(episodes, store, fold=3, splits={**SPLITS, "test": [Episode("a", ("c", "d"), 1)]})
    write_pairs(pairs, store, PAIRS[::-1])
    message = rf"expected the table '{{}}' as it was drawn, .* delete the folder '{folder}' and submit the job again"
    with pytest.raises(InputError, match=message.format(episodes)):
        read_episodes(episodes, of_episodes, "validation")  # even where the split's own rows are as they were
    with pytest.raises(InputError, match=message.format(pairs)):
        read_pairs(pairs, of_pairs)


def test_a_flipped_bit_is_found(store: ImageStore, tmp_path: Path) -> None:
    path = tmp_path / "pairs.arrow"
    sha256 = write_pairs(str(path), store, PAIRS)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(InputError, match="altered or damaged"):
            read_pairs(str(path), sha256)


def test_plain_pyarrow_reads_the_tables(store: ImageStore, tmp_path: Path) -> None:
    write_episodes(str(tmp_path / "episodes.arrow"), store, fold=3, splits=SPLITS)
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
    assert (pairs["image_row"].to_pylist(), pairs["class_id"].to_pylist()) == ROWS_OF_PAIRS


def test_the_same_lists_give_the_same_bytes(store: ImageStore, tmp_path: Path) -> None:
    lists = {"1": PAIRS, "2": PAIRS, "3": PAIRS[::-1]}
    hashes = [write_pairs(str(tmp_path / name), store, pairs) for name, pairs in lists.items()]
    assert [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in lists] == hashes
    assert hashes[0] == hashes[1] != hashes[2]


def test_nothing_is_a_list_too(store: ImageStore, tmp_path: Path) -> None:
    sha256 = write_episodes(str(tmp_path / "e"), store, fold=0, splits={"test": []})
    assert read_episodes(str(tmp_path / "e"), sha256, "test") == []
    pairs = read_pairs(str(tmp_path / "p"), write_pairs(str(tmp_path / "p"), store, []))
    assert len(pairs.images) == len(pairs.class_ids) == 0


def test_an_image_that_the_store_does_not_hold(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected image 'z' in the store"):
        write_pairs(str(tmp_path / "p"), store, [("a", 0), ("z", 1)])
    with pytest.raises(InputError, match="expected image 'z' in the store"):
        write_episodes(str(tmp_path / "e"), store, fold=0, splits={"test": [Episode("a", ("z",), 0)]})
    assert list(tmp_path.iterdir()) == []  # nothing half-written
