"""Episodes as batches of tensors: what the loader hands to the training step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mshnet.data.episodes import Episode
from mshnet.data.store.images import ImageStore
from mshnet.errors import InputError

READ_AHEAD_EPISODES = 4096
"""Of how many episodes to come the shards are asked for at once: two random images of each touch some thousand."""


@dataclass(frozen=True, kw_only=True)
class EpisodeBatch:
    """b episodes of k shots; pixels stay uint8 until they are on the device."""

    query_images: UInt8[Tensor, "b 3 H W"]
    query_masks: UInt8[Tensor, "b H W"]
    """1 object, 0 background, 255 ignored by the metric."""
    support_images: UInt8[Tensor, "b k 3 H W"]
    support_masks: UInt8[Tensor, "b k H W"]
    query_rows: tuple[int, ...]
    """Rows in the store, by which features are cached."""
    support_rows: tuple[tuple[int, ...], ...]
    class_ids: tuple[int, ...]

    def to(self, device: torch.device) -> EpisodeBatch:
        """The same batch with its tensors on a device."""
        return EpisodeBatch(
            query_images=self.query_images.to(device, non_blocking=True),
            query_masks=self.query_masks.to(device, non_blocking=True),
            support_images=self.support_images.to(device, non_blocking=True),
            support_masks=self.support_masks.to(device, non_blocking=True),
            query_rows=self.query_rows,
            support_rows=self.support_rows,
            class_ids=self.class_ids,
        )

    def __len__(self) -> int:
        return len(self.class_ids)


@runtime_checkable  # the tests' run-time shape check needs isinstance
class EpisodeSequence(Protocol):
    """Episodes by position: a stored list, or a sampler bound to its epoch."""

    def __getitem__(self, position: int, /) -> Episode[int]: ...


class EpisodeDataset(Dataset[EpisodeBatch]):
    """Loads the episode at a position as a batch of one."""

    def __init__(self, store: ImageStore, episodes: EpisodeSequence) -> None:
        self.store = store
        self.episodes = episodes

    def __getitem__(self, position: int) -> EpisodeBatch:
        episode = self.episodes[position]
        query, supports = episode.query, episode.supports
        query_image, query_mask = self.store.pixels(query, episode.class_id, with_ignore=True)
        images, masks = zip(*(self.store.pixels(row, episode.class_id) for row in supports), strict=True)
        return EpisodeBatch(
            query_images=query_image[None],
            query_masks=query_mask[None],
            support_images=torch.stack(images)[None],
            support_masks=torch.stack(masks)[None],
            query_rows=(query,),
            support_rows=(supports,),
            class_ids=(episode.class_id,),
        )


def join(batches: Sequence[EpisodeBatch]) -> EpisodeBatch:
    """One batch of many."""
    return EpisodeBatch(
        query_images=_joined([b.query_images for b in batches]),
        query_masks=_joined([b.query_masks for b in batches]),
        support_images=_joined([b.support_images for b in batches]),
        support_masks=_joined([b.support_masks for b in batches]),
        query_rows=tuple(row for b in batches for row in b.query_rows),
        support_rows=tuple(rows for b in batches for rows in b.support_rows),
        class_ids=tuple(c for b in batches for c in b.class_ids),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    # In a loader process torch's own function puts the batch where the other process reads it, without a copy more.
    joined: Tensor = default_collate([episode for part in parts for episode in part])
    return joined


def load_batches(
    dataset: EpisodeDataset, positions: Sequence[Sequence[int]], processes: int = 0
) -> Iterator[EpisodeBatch]:
    """Batches at the given positions, in order, read by `processes` loader processes (0: this one).

    Where the store is remote, its shards begin to come to this node at once, those needed first in front.
    """
    upcoming, episodes = islice(chain.from_iterable(positions), READ_AHEAD_EPISODES), dataset.episodes
    dataset.store.read_ahead(row for position in upcoming for row in episodes[position].images)
    loader: DataLoader[EpisodeBatch] = DataLoader(
        dataset,
        batch_sampler=[list(batch) for batch in positions],
        collate_fn=join,
        num_workers=processes,
        # Forking a process that holds Ray's and torch's threads can hang.
        multiprocessing_context="spawn" if processes else None,
    )
    return _without_traceback(iter(loader))


class EpisodeLoader:
    """Batches of episodes from a store, read ahead by loader processes that live as long as this does.

    The order of the batches is that of the positions, whatever `processes`. With a `device` they come on it.
    A context manager; raises InputError as the store does.
    """

    def __init__(self, store: ImageStore, processes: int = 0, device: torch.device | None = None) -> None:
        """`processes` loader processes; 0: this one reads."""
        self.store, self.processes, self.device = store, processes, device
        self.waited_s = 0.0
        """Seconds that the consumer waited for a batch, since construction."""

    def batches(self, episodes: EpisodeSequence, positions: Sequence[Sequence[int]]) -> Iterator[EpisodeBatch]:
        """A batch of the episodes at each of the positions, in order."""
        batches = load_batches(EpisodeDataset(self.store, episodes), positions, self.processes)
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.waited_s += time.monotonic() - started
            if batch is None:
                return
            yield batch if self.device is None else batch.to(self.device)

    def close(self) -> None:
        """End the loader processes."""

    def __enter__(self) -> EpisodeLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _without_traceback(batches: Iterator[EpisodeBatch]) -> Iterator[EpisodeBatch]:
    # Torch wraps what a loader process raises in the text of its traceback.
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).rsplit("InputError: ", 1)[-1].strip()) from None
