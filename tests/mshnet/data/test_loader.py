"""The loader's processes: the same batches whoever decodes them, nothing left behind however anybody ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from mshnet.data.batches import EpisodeBatch, EpisodeLoader
from mshnet.data.episodes import Episode, NumberedPairs, TrainingSampler
from mshnet.data.passes import KEPT_BATCHES
from mshnet.data.readers import LoaderProcessError
from mshnet.data.store.images import ImageStore
from mshnet.errors import InputError
from tests.mshnet.data.stored import noise_image, write_store
from tests.mshnet.data.test_batches import assert_same

DEADLINE_S = 30.0
EPISODES = [Episode(i % 8, ((i + 3) % 8, (i + 1) % 8), 2 * (i % 2)) for i in range(60)]
POSITIONS = [range(i, min(i + 4, 50)) for i in range(0, 50, 4)]  # the last one is smaller


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    images = {f"{seed}": noise_image(seed, 40 + 5 * seed, 60) for seed in range(8)}
    return write_store(str(tmp_path_factory.mktemp("store")), images)


@pytest.fixture(scope="module")
def loader(store: ImageStore) -> Iterator[EpisodeLoader]:
    """Two processes for the tests that do them no harm; made once, as a start takes seconds."""
    with EpisodeLoader(store, processes=2) as loader:
        yield loader


@pytest.fixture(scope="module")
def expected(store: ImageStore) -> list[EpisodeBatch]:
    return list(EpisodeLoader(store).batches(EPISODES, POSITIONS))


@dataclass(frozen=True)
class Epoch:
    """A sampler bound to an epoch, as training has it."""

    sampler: TrainingSampler
    epoch: int

    def __getitem__(self, position: int) -> Episode[int]:
        return self.sampler.episode(self.epoch, position)


@pytest.mark.parametrize("processes", [1, 4])
def test_order_and_pixels_are_the_same_for_any_number_of_processes(
    processes: int, store: ImageStore, expected: list[EpisodeBatch]
) -> None:
    """Also of batches that are looked at when the loader is closed; then its processes are gone."""
    with EpisodeLoader(store, processes) as loader:
        found = list(loader.batches(EPISODES, POSITIONS))
        pids = loader.processes
        assert len(set(pids)) == processes
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert loader.processes == ()
    assert [len(batch) for batch in found] == [4] * 12 + [2]
    for batch, other in zip(found, expected, strict=True):
        assert_same(batch, other)


def test_a_samplers_epochs_come_as_it_draws_them_from_the_same_processes(
    store: ImageStore, loader: EpisodeLoader
) -> None:
    pairs = NumberedPairs(np.arange(16, dtype=np.int32) % 8, np.repeat(np.array([0, 2], np.int32), 8))
    sampler = TrainingSampler(pairs, (0, 2), shot=2, seed=5, episodes_per_epoch=24)
    before = loader.processes
    for epoch in range(2):
        batches = loader.batches(Epoch(sampler, epoch), [range(i, i + 8) for i in range(0, 24, 8)])
        drawn = [(q, s, c) for b in batches for q, s, c in zip(b.query_rows, b.support_rows, b.class_ids, strict=True)]
        wanted = [sampler.episode(epoch, position) for position in range(24)]
        assert drawn == [(e.query, e.supports, e.class_id) for e in wanted]
    assert loader.processes == before
    assert all(psutil.pid_exists(pid) for pid in before)


def test_passes_of_other_sizes_follow_each_other(
    loader: EpisodeLoader, store: ImageStore, expected: list[EpisodeBatch]
) -> None:
    """What was handed out before keeps its pixels, wherever the next pass's batches lie."""
    first = next(loader.batches(EPISODES, POSITIONS))
    large = list(loader.batches(EPISODES, [range(60)]))
    assert_same(large[0], next(EpisodeLoader(store).batches(EPISODES, [range(60)])))
    assert_same(next(loader.batches(EPISODES, [[7]])), next(EpisodeLoader(store).batches(EPISODES, [[7]])))
    assert list(loader.batches(EPISODES, [])) == []
    assert_same(first, expected[0])


def test_a_consumer_may_keep_every_batch(loader: EpisodeLoader, expected: list[EpisodeBatch]) -> None:
    kept = list(loader.batches(EPISODES, POSITIONS))
    for batch in loader.batches(EPISODES[::-1], POSITIONS):  # written over, if anything were
        del batch
    for batch, other in zip(kept, expected, strict=True):
        assert_same(batch, other)


def test_part_of_a_batch_keeps_its_memory(loader: EpisodeLoader, expected: list[EpisodeBatch]) -> None:
    part = next(loader.batches(EPISODES, POSITIONS)).support_masks[1, 1]
    gc.collect()
    for _ in range(2):
        list(loader.batches(EPISODES[::-1], POSITIONS))
    assert torch.equal(part, expected[0].support_masks[1, 1])


def test_memory_is_used_again(loader: EpisodeLoader) -> None:
    """Batches decoded ahead, and two that the consumer has; however long the epoch."""
    list(loader.batches(EPISODES, POSITIONS))
    gc.collect()
    places, most = set(), 0
    for batch in loader.batches(EPISODES, POSITIONS * 8):
        places.add(batch.query_images.data_ptr())
        readers = loader._readers
        assert readers
        most = max(most, len(readers.slots.lent))
    assert most <= KEPT_BATCHES
    assert len(places) <= readers.slots.count < 8


def test_a_consumer_that_stops_early_leaves_the_loader_usable(
    loader: EpisodeLoader, expected: list[EpisodeBatch]
) -> None:
    for _ in range(3):
        stale = loader.batches(EPISODES, POSITIONS)
        assert_same(next(stale), expected[0])
    for batch, other in zip(loader.batches(EPISODES, POSITIONS), expected, strict=True):
        assert_same(batch, other)
    with pytest.raises(RuntimeError, match="another has begun"):
        next(stale)


def test_only_waiting_is_counted(loader: EpisodeLoader) -> None:
    before, started = loader.waited_s, time.monotonic()
    batches = loader.batches(EPISODES, POSITIONS)
    next(batches)
    waited, elapsed = loader.waited_s - before, time.monotonic() - started
    assert 0 < waited <= elapsed
    time.sleep(0.2)  # a consumer that works
    middle = loader.waited_s
    assert loader.waited_s - before == waited
    next(batches)
    assert loader.waited_s > middle


@pytest.mark.parametrize("processes", [0, 1])
def test_a_damaged_row_is_reported_in_its_batchs_turn_and_others_can_go_on(processes: int, tmp_path: Path) -> None:
    store = write_store(str(tmp_path), {f"{seed}": noise_image(seed) for seed in range(6)})
    shard = tmp_path / store.manifest.shards[1].name
    data = bytearray(shard.read_bytes())
    data[data.find(b"\x89PNG") + 60] ^= 1
    shard.write_bytes(data)
    episodes = [Episode(i, ((i + 1) % 3,), 0) for i in range(4)]
    with EpisodeLoader(store, processes) as loader:
        batches = loader.batches(episodes, [[0], [1], [3], [2]])
        assert [next(batches).query_rows for _ in range(2)] == [(0,), (1,)]
        with pytest.raises(InputError) as raised:
            next(batches)
        assert [batch.query_rows for batch in loader.batches(episodes, [[2], [1]])] == [(2,), (1,)]
    with pytest.raises(InputError) as direct:
        store.pixels(3, 0)
    assert str(raised.value) == str(direct.value)
    assert f"in shard {shard.name}" in str(raised.value)


def test_a_loader_process_that_fails_otherwise_says_how(loader: EpisodeLoader) -> None:
    with pytest.raises(LoaderProcessError, match=r"(?s)loader process \d+ failed.*row must be 0..7, got 99"):
        list(loader.batches([Episode(99, (0,), 0)], [[0]]))


def test_a_killed_loader_process_is_named(store: ImageStore) -> None:
    """At work, so that it takes a task with it that nobody else can do."""
    with EpisodeLoader(store, processes=2) as loader:
        batches = loader.batches(EPISODES, [range(60)] * 1000)
        next(batches)
        victim = loader.processes[1]
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(LoaderProcessError, match=f"loader process {victim} was killed by SIGKILL"):
            list(batches)


CONSUMER = """
import sys, time
from mshnet.data.batches import EpisodeLoader
from mshnet.data.episodes import Episode
from mshnet.data.store.images import ImageStore

loader = EpisodeLoader(ImageStore(sys.argv[1]), processes=2)
for i, batch in enumerate(loader.batches([Episode(0, (1,), 0)] * 100_000, [[i] for i in range(100_000)])):
    if i == 3:
        print(*loader.processes, flush=True)
        if sys.argv[2] == "raise":
            raise RuntimeError("the consumer fails")
"""


def mapped(process: psutil.Process) -> set[str]:
    """Files in a process's memory; one without a name any more ends with `(deleted)`."""
    try:
        return {m.path for m in process.memory_maps(grouped=True)}
    except psutil.NoSuchProcess:  # ended meanwhile, a zombie among others
        return set()


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_nothing_is_left_however_the_consumer_ends(how: str, store: ImageStore) -> None:
    line = [sys.executable, "-c", CONSUMER, store.uri, how]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as consumer:
        assert consumer.stdout
        children = [psutil.Process(int(pid)) for pid in consumer.stdout.readline().split()]
        assert len(children) == 2
        memory = set[str]().union(*map(mapped, [psutil.Process(consumer.pid), *children]))
        assert any("mshnet-batches" in path for path in memory)
        if how == "kill":
            consumer.kill()
        assert consumer.wait(DEADLINE_S) == {"kill": -signal.SIGKILL, "raise": 1}[how]
    gone, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert alive == []
    assert len(gone) == 2
    assert not [path for path in memory if path.startswith("/dev/shm/") and Path(path).exists()]


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [0, 2])
def test_batches_on_a_gpu_are_the_same_while_it_is_busy(
    processes: int, store: ImageStore, expected: list[EpisodeBatch]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    load = torch.randn(2048, 2048, device=device)
    with EpisodeLoader(store, processes, device) as loader:
        for _ in range(3):
            found = []
            for batch in loader.batches(EPISODES, POSITIONS):
                load = torch.tanh(load @ load)
                found.append(batch)
            for batch, other in zip(found, expected, strict=True):
                assert batch.query_images.device == device
                assert_same(batch.to(torch.device("cpu")), other)
