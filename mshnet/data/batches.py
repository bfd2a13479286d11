"""Episodes as batches of tensors: what the loader hands to the training step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, tee
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from mshnet.data.episodes import Episode
from mshnet.data.passes import LocalPass, Pass, SharedPass, UploadedPass
from mshnet.data.readers import Readers, Wanted
from mshnet.data.store.images import ImageStore
from mshnet.profiling import region

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


@dataclass(frozen=True)
class _Layout:
    """How a batch of b episodes of k shots lies in one piece of memory: images, channels last, then masks.

    Of both the queries' come first, then the supports', episode by episode.
    """

    episodes: tuple[Episode[int], ...]
    side_px: int

    @property
    def rows(self) -> int:
        return sum(1 + len(episode.supports) for episode in self.episodes)

    @property
    def nbytes(self) -> int:
        return 4 * self.rows * self.side_px**2

    def wanted(self) -> list[Wanted]:
        """What to decode, and where to."""
        area, masks_at = self.side_px**2, 3 * self.rows * self.side_px**2
        queries = [(episode.query, episode.class_id, True) for episode in self.episodes]
        supports = [(row, episode.class_id, False) for episode in self.episodes for row in episode.supports]
        return [Wanted(*row, 3 * area * i, masks_at + area * i) for i, row in enumerate(queries + supports)]

    def batch(self, memory: UInt8[Tensor, " bytes"]) -> EpisodeBatch:
        """The batch that is in the memory; a view."""
        b, n, side = len(self.episodes), self.rows, self.side_px
        images, masks = memory[: self.nbytes].split((3 * n * side**2, n * side**2))
        images, masks = images.view(n, side, side, 3).permute(0, 3, 1, 2), masks.view(n, side, side)
        return EpisodeBatch(
            query_images=images[:b],
            query_masks=masks[:b],
            support_images=images[b:].unflatten(0, (b, -1)),
            support_masks=masks[b:].unflatten(0, (b, -1)),
            query_rows=tuple(episode.query for episode in self.episodes),
            support_rows=tuple(episode.supports for episode in self.episodes),
            class_ids=tuple(episode.class_id for episode in self.episodes),
        )


class EpisodeLoader:
    """Batches of episodes from a store, decoded ahead of need by processes that live as long as this does.

    The order of the batches is that of the positions, and their content the same, whatever `processes`. The episodes
    at the positions are looked up here, so the processes know rows only and serve any list or sampler. A batch is
    decoded in its place: images are channels last in memory. It is the consumer's as long as a tensor of it is
    referred to; memory is bounded by what is decoded ahead, two batches and what the consumer keeps.

    With a CUDA `device` batches come on it: by a stream of its own, from pinned memory, the next one while the
    consumer computes. A context manager, for one pass at a time.

    Raises InputError as the store does, in the turn of the batch concerned, and LoaderProcessError, naming it, where
    a process was killed; then make another loader.
    """

    def __init__(self, store: ImageStore, processes: int = 0, device: torch.device | None = None) -> None:
        """`processes` loader processes, which start at once and in the background; 0: this one reads, when asked."""
        self.store, self.device = store, device
        self.waited_s = 0.0
        """Seconds that the consumer waited for a batch, since construction."""
        self._readers = Readers(store, processes) if processes else None
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    @property
    def processes(self) -> tuple[int, ...]:
        """The loader processes' ids."""
        return tuple(process.pid for process in self._readers.processes) if self._readers else ()

    def wait_until_started(self) -> None:
        """Until every loader process is up, which takes seconds; for measurements: a pass need not wait for it."""
        if self._readers:
            self._readers.wait_until_started()

    def batches(self, episodes: EpisodeSequence, positions: Sequence[Sequence[int]]) -> Iterator[EpisodeBatch]:
        """A batch of the episodes at each of the positions, in order. Ends the pass before.

        Where the store is remote, its shards begin to come to this node at once, those needed first in front.
        """
        upcoming = islice(chain.from_iterable(positions), READ_AHEAD_EPISODES)
        self.store.read_ahead(row for position in upcoming for row in episodes[position].images)
        side = self.store.manifest.format.image_size_px
        layouts, plans = tee(_Layout(tuple(episodes[i] for i in batch), side) for batch in positions)
        return self._batches(layouts, self._pass(plans, max(map(len, positions), default=0)))

    def _pass(self, plans: Iterator[_Layout], most: int) -> Pass:
        pinned = self._stream is not None
        memories: Pass = LocalPass(self.store, plans, pinned)
        if self._readers and (first := next(plans, None)):
            most_bytes = most * (first.nbytes // len(first.episodes))
            memories = SharedPass(self._readers, chain([first], plans), most_bytes, pinned)
        if self.device is not None and self._stream is not None:
            memories = UploadedPass(memories, self.device, self._stream)
        return memories

    def _batches(self, layouts: Iterator[_Layout], memories: Pass) -> Iterator[EpisodeBatch]:
        for layout in layouts:
            started = time.monotonic()
            with region("loader wait"):
                memory = next(memories)
            self.waited_s += time.monotonic() - started
            batch = layout.batch(memory)
            del memory  # the consumer alone says how long it is kept
            yield batch
            del batch

    def close(self) -> None:
        """End the loader processes. Batches that were handed out stay good."""
        if self._readers:
            self._readers.close()
            self._readers = None

    def __enter__(self) -> EpisodeLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
