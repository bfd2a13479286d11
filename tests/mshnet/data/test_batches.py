"""Episodes as batches: the store's own pixels in place, the same whoever loads them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice

import pytest
import torch
from torch import Tensor

from mshnet.data.batches import READ_AHEAD_EPISODES, EpisodeBatch, EpisodeLoader, EpisodeSequence
from mshnet.data.episodes import Episode
from mshnet.data.store.images import ImageStore
from tests.mshnet.data.stored import noise_image, write_store

EPISODES = [
    Episode(2, (0, 3), 2),
    Episode(0, (1, 2), 0),
    Episode(3, (1, 0), 2),
    Episode(1, (3, 3), 0),
    Episode(0, (2, 3), 1),  # a class that none of them shows
]
POSITIONS = [[0, 1], [3], [4, 2]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    images = {name: noise_image(seed, 40 + 5 * seed, 60) for seed, name in enumerate("abcd")}
    return write_store(str(tmp_path_factory.mktemp("store")), images)


def load(store: ImageStore, episodes: EpisodeSequence, positions: Sequence[Sequence[int]]) -> Iterator[EpisodeBatch]:
    return EpisodeLoader(store).batches(episodes, positions)


def assert_same(found: EpisodeBatch, expected: EpisodeBatch) -> None:
    for field in fields(EpisodeBatch):
        x, y = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x, y), field.name
        else:
            assert x == y, field.name


def test_a_batch_holds_the_stores_pixels(store: ImageStore) -> None:
    (batch,) = load(store, EPISODES, [[0, 1, 3]])
    assert len(batch) == 3
    shapes = {
        "query_images": (3, 3, 65, 65),
        "query_masks": (3, 65, 65),
        "support_images": (3, 2, 3, 65, 65),
        "support_masks": (3, 2, 65, 65),
    }
    for name, shape in shapes.items():
        tensor = getattr(batch, name)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, torch.uint8)
    assert batch.class_ids == (2, 0, 0)
    assert batch.query_rows == (2, 0, 1)
    assert batch.support_rows == ((0, 3), (1, 2), (3, 3))
    for i, (query, supports, class_id) in enumerate(
        zip(batch.query_rows, batch.support_rows, batch.class_ids, strict=True)
    ):
        assert torch.equal(batch.query_images[i], store.image(query))
        assert torch.equal(batch.query_masks[i], store.mask(query, class_id, with_ignore=True))
        for k, row in enumerate(supports):
            assert torch.equal(batch.support_images[i, k], store.image(row))
            assert torch.equal(batch.support_masks[i, k], store.mask(row, class_id))


def test_ignored_pixels_are_kept_in_queries_only(store: ImageStore) -> None:
    (batch,) = load(store, EPISODES, [[0, 1, 2, 3]])
    assert batch.query_masks.unique().tolist() == [0, 1, 255]
    assert batch.support_masks.unique().tolist() == [0, 1]
    assert all((mask == 255).sum() > 65 for mask in batch.query_masks)
    (absent,) = load(store, EPISODES, [[4]])
    assert absent.query_masks.unique().tolist() == [0, 255]
    assert absent.support_masks.sum() == 0


def test_batches_come_in_the_order_asked_for(store: ImageStore) -> None:
    found = list(load(store, EPISODES, POSITIONS))
    assert [batch.class_ids for batch in found] == [(2, 0), (0,), (1, 2)]
    assert [batch.query_rows for batch in found] == [(2, 0), (1,), (0, 3)]
    assert [batch.support_rows for batch in found] == [((0, 3), (1, 2)), ((3, 3),), ((2, 3), (1, 0))]
    moved = found[0].to(torch.device("cpu"))
    assert_same(moved, found[0])


def test_images_lie_in_memory_as_convolutions_want_them(store: ImageStore) -> None:
    (batch,) = load(store, EPISODES, [[0, 1, 3]])
    assert batch.query_images.is_contiguous(memory_format=torch.channels_last)
    assert batch.support_images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert batch.support_images.flatten(0, 1).data_ptr() == batch.support_images.data_ptr()  # a view


def test_the_rows_to_come_are_read_ahead_in_order_and_no_sooner_than_asked_for(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless:
        """Episodes that are computed when they are asked for, as a sampler's are."""

        asked = 0

        def __getitem__(self, position: int) -> Episode[int]:
            self.asked += 1
            return EPISODES[position % len(EPISODES)]

    announced: list[Iterable[int]] = []
    monkeypatch.setattr(store, "read_ahead", announced.append)
    episodes = Endless()
    load(store, episodes, [range(i, i + 100) for i in range(0, 10_000, 100)])
    (rows,) = announced
    assert episodes.asked == 0
    assert list(islice(rows, 7)) == [2, 0, 3, 0, 1, 2, 3]
    assert episodes.asked == 3
    assert sum(1 for _ in rows) == 3 * READ_AHEAD_EPISODES - 7  # bounded, however long the epoch


def test_what_is_read_ahead_does_not_keep_the_store(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the store is the end of the thread that goes through the rows."""
    announced: list[Iterable[int]] = []
    monkeypatch.setattr(ImageStore, "read_ahead", lambda self, rows: announced.append(rows))
    opened = ImageStore(store.uri)
    end = weakref.ref(opened)
    load(opened, EPISODES, POSITIONS)
    del opened
    gc.collect()
    assert end() is None
    assert list(announced[0])[:3] == [2, 0, 3]
