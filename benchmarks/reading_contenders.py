"""The contenders of benchmarks/reading.py, each as a loader of episode batches, and one clock for all."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from episode_formats import SIDE_PX, MdsEpisodes, MdsRows, PlainFiles, Tars, encoded_rows, open_mds
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from mshnet.data.batches import EpisodeBatch, EpisodeLoader
from mshnet.data.episodes import Episode
from mshnet.data.store import decode
from mshnet.data.store.images import ImageStore

DataSet = Literal["coco", "voc"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that a contender's process needs."""

    data: DataSet
    source: Path
    store: str
    """Local, or on object storage."""
    samples: str
    """Folder of the other formats, likewise."""
    cache: Path
    """Folder for local copies of remote files."""
    shot: int
    episodes: tuple[Episode[int], ...]
    batch: int
    processes: int

    def plain_files(self) -> PlainFiles:
        return PlainFiles(self.source, ImageStore(self.store).image_ids, self.episodes)

    def mds(self, name: str) -> Any:
        return open_mds(self.samples, name, self.cache, self.batch)

    def tars(self) -> Tars:
        return Tars(self.samples, self.shot, self.cache)


class Gate:
    """Holds every loader process at its first sample until all of them, and the clock, are ready."""

    def __init__(self, processes: int) -> None:
        self._barrier = multiprocessing.get_context("spawn").Barrier(processes + 1)
        self._passed = False

    def open(self) -> None:
        """For whoever knows by other means that its processes are up."""
        self._passed = True

    def wait(self) -> None:
        if not self._passed:
            self._passed = True
            self._barrier.wait(timeout=300)


class GatedSamples(Dataset[EpisodeBatch]):
    """Any other data set by position, waiting at the gate."""

    def __init__(self, load: Callable[[Episode[int]], EpisodeBatch], task: Task, gate: Gate) -> None:
        self.load, self.episodes, self.gate = load, task.episodes, gate

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, position: int) -> EpisodeBatch:
        self.gate.wait()
        return self.load(self.episodes[position])


class GatedStream(IterableDataset[EpisodeBatch]):
    """Any data set in order, waiting at the gate."""

    def __init__(self, samples: Iterable[EpisodeBatch], gate: Gate) -> None:
        self.samples, self.gate = samples, gate

    def __iter__(self) -> Iterator[EpisodeBatch]:
        self.gate.wait()
        yield from self.samples


def joined(batches: Sequence[EpisodeBatch]) -> EpisodeBatch:
    """One batch of many; in a loader process put where the other process reads it, without a copy more."""

    def whole(name: str) -> Any:
        return default_collate([episode for batch in batches for episode in getattr(batch, name)])

    return EpisodeBatch(
        query_images=whole("query_images"),
        query_masks=whole("query_masks"),
        support_images=whole("support_images"),
        support_masks=whole("support_masks"),
        query_rows=tuple(row for b in batches for row in b.query_rows),
        support_rows=tuple(rows for b in batches for rows in b.support_rows),
        class_ids=tuple(c for b in batches for c in b.class_ids),
    )


def loader(dataset: Any, task: Task) -> Iterator[EpisodeBatch]:
    """Torch's loader, its processes started afresh as ours are."""
    return iter(
        DataLoader(
            dataset,
            batch_size=task.batch,
            collate_fn=joined,
            num_workers=task.processes,
            multiprocessing_context="spawn",
        )
    )


def ours(task: Task, gate: Gate) -> Iterator[EpisodeBatch]:
    loader = EpisodeLoader(ImageStore(task.store), task.processes)
    loader.wait_until_started()
    gate.open()
    positions = range(len(task.episodes))
    batches = [positions[i : i + task.batch] for i in range(0, len(positions), task.batch)]
    return _begun_late(loader, task, batches)


def _begun_late(loader: EpisodeLoader, task: Task, batches: Sequence[range]) -> Iterator[EpisodeBatch]:
    """Begins to read, also ahead, when the first batch is asked for."""
    with loader:
        yield from loader.batches(task.episodes, batches)


def plain_files(task: Task, gate: Gate) -> Iterator[EpisodeBatch]:
    return loader(GatedSamples(task.plain_files(), task, gate), task)


def mds_by_index(task: Task, gate: Gate) -> Iterator[EpisodeBatch]:
    return loader(GatedSamples(MdsRows(task.mds("mds_images")), task, gate), task)


def mds_in_order(task: Task, gate: Gate) -> Iterator[EpisodeBatch]:
    return loader(GatedStream(MdsEpisodes(task.mds(f"mds_{task.shot}shot")), gate), task)


def webdataset_in_order(task: Task, gate: Gate) -> Iterator[EpisodeBatch]:
    return loader(GatedStream(task.tars(), gate), task)


CONTENDERS: Mapping[str, Callable[[Task, Gate], Iterator[EpisodeBatch]]] = {
    "ours": ours,
    "plain files, as published": plain_files,
    "mosaicml-streaming by index": mds_by_index,
    "mosaicml-streaming in order": mds_in_order,
    "webdataset in order": webdataset_in_order,
}
BARE = "bare decoding"


def measured(name: str, task: Task) -> tuple[float, float]:
    """(seconds to the first batch, to the last) of a pass over the episodes, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_pass, args=(name, task, its))
    process.start()
    its.close()
    try:
        first_s, seconds, episodes = mine.recv()
    except EOFError:
        raise SystemExit(f"{name} failed, see above") from None
    process.join()
    if episodes != len(task.episodes):
        raise SystemExit(f"{name} gave {episodes} episodes, expected {len(task.episodes)}")
    return first_s, seconds


def _pass(name: str, task: Task, report: Any) -> None:
    os.environ["MSHNET_CACHE_DIR"] = str(task.cache / "ours")
    gate = Gate(task.processes)
    batches = CONTENDERS[name](task, gate)
    gate.wait()
    started = time.monotonic()
    first_s, episodes = 0.0, 0
    for batch in batches:
        first_s = first_s or time.monotonic() - started
        episodes += len(batch)
    report.send((first_s, time.monotonic() - started, episodes))


def bare(task: Task) -> tuple[float, float]:
    """The same for the decoder alone."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(task.processes + 1)
    processes = [context.Process(target=_decode, args=(task, i, barrier)) for i in range(task.processes)]
    for process in processes:
        process.start()
    barrier.wait(timeout=300)
    started = time.monotonic()
    barrier.wait(timeout=300)
    seconds = time.monotonic() - started
    for process in processes:
        process.join()
    return seconds, seconds


def _decode(task: Task, number: int, barrier: Any) -> None:
    torch.set_num_threads(1)
    rows = encoded_rows(Path(task.store))
    mine = [
        (rows[row], episode.class_id, i == 0)
        for episode in task.episodes[number :: task.processes]
        for i, row in enumerate((episode.query, *episode.supports))
    ]
    barrier.wait()
    for row, class_id, with_ignore in mine:
        decode.picture(row)
        decode.mask(row, class_id, SIDE_PX, with_ignore)
    barrier.wait()
