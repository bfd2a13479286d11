"""The loader against bare JPEG decoding: same images, same cores, in turns.

    python benchmarks/loader.py --work outputs/loader
    python benchmarks/loader.py --work outputs/loader --dataset coco --source DIR/COCO2014

Data: the images of --source, or 600 generated COCO ones (benchmarks/coco_scale.py), preprocessed to 473 px by the real
command; --work keeps them for the next time. Episodes: class, query and supports at random among the images that show
the class; so many that on average each image is visited --visits times. Everything runs on --cores cores (this process
and all that it starts are bound to them), with as many decoding processes as cores; files are in the page cache.

- bare decoding: each process holds its part of the same images' JPEG bytes in a list and calls
  `torchvision.io.decode_image(bytes, ImageReadMode.RGB)` on one after the other; the pixels are dropped, nothing is
  handed on. No checksum, no mask, no file, no batch.
- processes: `EpisodeLoader` as training uses it, in batches of --batch: rows found, checked (CRC-32) and decoded, masks
  decoded and resized, batches put together in the consumer's reach. The consumer drops them; its work counts.
- threads: as many threads of one process do the same per row, into memory of their own.
- S3, warm: `EpisodeLoader` on a store on a real S3 server (infra/object_store.sh, started here) whose shards are in
  the node's cache. Left out, by name, where Ceph is not installed.

Each contender is started and has made a pass before the clock starts. Contenders take turns, --repetitions times. The
table has medians; a ratio is taken within a turn. Ratios of the clock suffer from other work on the machine, which hits
one contender or the other; CPU time per image (of all the processes of a contender) hardly does, so it is given beside.
Takes about a minute (--quick: a few seconds of measuring). Results: docs/benchmarks/loader.md.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import tyro
from torchvision.io import ImageReadMode, decode_image

from mshnet.data.batches import EpisodeLoader
from mshnet.data.episodes import Episode
from mshnet.data.filesystem import filesystem
from mshnet.data.store.images import ImageStore

REPOSITORY = Path(__file__).resolve().parents[1]
GPU_EPISODES_PER_S, GPU_CORES = 400, 8
"""What the loader has to stay ahead of, by calculation, and with how many cores."""
BARE = "bare decoding"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure, where."""

    work: Path
    """Folder for generated data and stores: about 0.3 GB."""
    source: Path | None = None
    """Real data to read; by default some are generated."""
    dataset: Literal["coco", "pascal"] = "coco"
    """What the source holds."""
    store: str = ""
    """An image store to read instead of preprocessing."""
    images: int = 600
    """Generated images."""
    shots: tuple[int, ...] = (1, 5)
    """Supports per episode."""
    batch: int = 8
    """Episodes in a batch."""
    cores: int = 0
    """To run on, and processes to decode with; 0: all that this process may use."""
    visits: int = 4
    """Of each image in a pass, on average."""
    repetitions: int = 7
    """Of every measurement, in turns."""
    seed: int = 0
    """Of the episodes."""
    quick: bool = False
    """One visit, three repetitions."""


@dataclass(frozen=True)
class Turn:
    """One pass of one contender."""

    seconds: float
    cpu_s: float
    """Of all its processes."""


Run = Callable[[], Turn]


# Contenders: each gives, when it is warm, a function that makes one pass


@contextlib.contextmanager
def bare(store: ImageStore, episodes: Sequence[Episode[int]], processes: int) -> Iterator[Run]:
    """Processes that decode the JPEG bytes of the same rows."""
    rows = [row for episode in episodes for row in episode.images]
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    started = []
    for i in range(processes):
        mine, its = context.Pipe()
        process = context.Process(target=_decode, args=(store, rows[i::processes], its), daemon=True)
        process.start()
        its.close()
        pipes.append(mine)
        started.append(psutil.Process(process.pid))

    def run() -> Turn:
        def work() -> None:
            for pipe in pipes:
                pipe.send(True)
            for pipe in pipes:
                pipe.recv()

        return clocked(work, started)

    run()
    yield run
    for pipe in pipes:
        pipe.send(False)


def _decode(store: ImageStore, rows: Sequence[int], pipe: Connection) -> None:
    torch.set_num_threads(1)
    encoded = [torch.frombuffer(store._read(row).image, dtype=torch.uint8) for row in rows]
    while pipe.recv():
        for data in encoded:
            decode_image(data, ImageReadMode.RGB)
        pipe.send(None)


@contextlib.contextmanager
def by_processes(store: ImageStore, episodes: Sequence[Episode[int]], batch: int, processes: int) -> Iterator[Run]:
    """The loader."""
    positions = cut(len(episodes), batch)
    with EpisodeLoader(store, processes) as loader:

        def work() -> None:
            for made in loader.batches(episodes, positions):
                del made

        work()
        helpers = [psutil.Process(pid) for pid in loader.processes]
        yield lambda: clocked(work, helpers)


@contextlib.contextmanager
def by_threads(store: ImageStore, episodes: Sequence[Episode[int]], batch: int, threads: int) -> Iterator[Run]:
    """The same per row, in threads; as far ahead as the loader."""
    side = store.manifest.format.image_size_px

    def read(row: int, class_id: int, with_ignore: bool, memory: np.ndarray) -> None:
        image, mask = np.split(memory, [3 * side * side])
        store.read_into(row, class_id, image.reshape(side, side, 3), mask.reshape(side, side), with_ignore)

    with ThreadPoolExecutor(threads) as pool:

        def submitted(positions: range) -> list[Future[None]]:
            wanted = [(r, episodes[p].class_id, i == 0) for p in positions for i, r in enumerate(episodes[p].images)]
            memory = np.empty((len(wanted), 4 * side * side), np.uint8)
            return [pool.submit(read, *row, memory[i]) for i, row in enumerate(wanted)]

        def work() -> None:
            ahead: deque[list[Future[None]]] = deque()
            for positions in cut(len(episodes), batch):
                ahead.append(submitted(positions))
                if len(ahead) > 2:
                    for future in ahead.popleft():
                        future.result()
            for futures in ahead:
                for future in futures:
                    future.result()

        work()
        yield lambda: clocked(work, [])


def clocked(work: Callable[[], None], others: Sequence[psutil.Process]) -> Turn:
    """Time of some work of this process and others."""

    def cpu() -> float:
        times = [process.cpu_times() for process in (psutil.Process(), *others)]
        return sum(time.user + time.system for time in times)

    before, started = cpu(), time.monotonic()
    work()
    return Turn(time.monotonic() - started, cpu() - before)


def cut(count: int, batch: int) -> list[range]:
    """Positions of batches."""
    return [range(i, min(i + batch, count)) for i in range(0, count, batch)]


# Data


def prepare(arguments: Arguments) -> str:
    """Generate and preprocess what is not there yet; gives the image store."""
    if arguments.store:
        return arguments.store
    work = arguments.work.resolve()
    source = arguments.source.resolve() if arguments.source else work / "source"
    if not arguments.source:
        line = [sys.executable, str(REPOSITORY / "benchmarks" / "coco_scale.py"), "--out", str(source)]
        subprocess.run([*line, "--images", str(arguments.images)], check=True, stdout=sys.stderr)
    line = [sys.executable, "-m", "pipelines.preprocess", "--dataset", arguments.dataset, "--source", str(source)]
    line += ["--store", str(work / "store"), "--images-per-shard", "200"]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    return str(json.loads(done.stdout.splitlines()[-1])["store"])


def draw(store: ImageStore, shot: int, visits: int, seed: int) -> tuple[Episode[int], ...]:
    """As many episodes as visit each image so often on average."""
    rng = np.random.default_rng((seed, shot))
    pools: dict[int, list[int]] = {}
    for row, (_, _, pixels) in enumerate(store.contents()):
        for class_id in pixels:
            pools.setdefault(class_id, []).append(row)
    pairs = [(row, c) for c in sorted(pools) if len(pools[c]) > shot for row in pools[c]]
    episodes = []
    for i in rng.integers(len(pairs), size=visits * len(store) // (shot + 1)):
        query, class_id = pairs[i]
        supports = rng.choice([row for row in pools[class_id] if row != query], shot, replace=False)
        episodes.append(Episode(query, tuple(supports.tolist()), class_id))
    return tuple(episodes)


@contextlib.contextmanager
def on_s3(local: str, work: Path) -> Iterator[str | None]:
    """The same store on a real S3 server, with an empty cache; None where Ceph is not installed."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.object_store import ABSENT, installed, running_in

    if not installed():
        print(f"S3 is left out: {ABSENT}", file=sys.stderr)
        yield None
        return
    with running_in(work.resolve() / "object_store") as server:
        os.environ.update(server.environment)
        os.environ["MSHNET_CACHE_DIR"] = str(work.resolve() / "cache")
        uri = f"s3://{server.bucket}/loader/images"
        fs, root = filesystem(uri)
        for path in sorted(Path(local).iterdir()):
            if path.is_file():
                fs.put_file(str(path), f"{root}/{path.name}")
        yield uri


# Measuring


def measure(arguments: Arguments, store: ImageStore, remote: ImageStore | None, cores: int, shot: int) -> list[str]:
    """The table's lines for one number of shots."""
    visits, repetitions = (1, 3) if arguments.quick else (arguments.visits, arguments.repetitions)
    episodes = draw(store, shot, visits, arguments.seed)
    found: dict[str, list[Turn]] = {}
    with contextlib.ExitStack() as ending:
        makers = {
            BARE: bare(store, episodes, cores),
            "processes, local": by_processes(store, episodes, arguments.batch, cores),
            "threads, local": by_threads(store, episodes, arguments.batch, cores),
        }
        if remote:
            makers["processes, S3 warm"] = by_processes(remote, episodes, arguments.batch, cores)
        runs = {name: ending.enter_context(maker) for name, maker in makers.items()}
        for i in range(repetitions):
            for name, run in runs.items():
                found.setdefault(name, []).append(run())
            print(f"{shot}-shot: turn {i + 1} of {repetitions} done", file=sys.stderr, flush=True)
    return [_line(name, found, shot, len(episodes), cores) for name in found]


def _line(name: str, found: Mapping[str, Sequence[Turn]], shot: int, episodes: int, cores: int) -> str:
    mine, other = found[name], found[BARE]
    images = episodes * (1 + shot)
    rate = images / _median([turn.seconds for turn in mine])
    ratio = _median([b.seconds / a.seconds for a, b in zip(mine, other, strict=True)])
    cpu_ms = 1e3 * _median([turn.cpu_s for turn in mine]) / images
    cpu_ratio = _median([b.cpu_s / a.cpu_s for a, b in zip(mine, other, strict=True)])
    line = f"| {shot} | {name} | {rate:.0f} | {ratio:.0%} | {cpu_ms:.2f} | {cpu_ratio:.0%} |"
    if name == BARE:
        return f"{line} | | |"
    per_core = rate / (1 + shot) / cores
    enough = GPU_CORES * per_core / GPU_EPISODES_PER_S
    return f"{line} {per_core:.0f} | {GPU_CORES} × {per_core:.0f} = {GPU_CORES * per_core:.0f} | {enough:.1f} |"


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def main() -> None:
    """Measure and print a table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.work.mkdir(parents=True, exist_ok=True)
    uri = prepare(arguments)
    allowed = sorted(os.sched_getaffinity(0))
    cores = arguments.cores or len(allowed)
    os.sched_setaffinity(0, allowed[:cores])
    torch.set_num_threads(1)
    store = ImageStore(uri)
    lines = [
        "| shots | | images/s | of bare decoding | CPU ms per image | CPU time: bare / this | episodes/s per core "
        f"| {GPU_CORES} cores, episodes/s | × {GPU_EPISODES_PER_S} |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    with on_s3(uri, arguments.work) as remote_uri:
        remote = ImageStore(remote_uri) if remote_uri else None
        for shot in arguments.shots:
            lines += measure(arguments, store, remote, cores, shot)
    print(f"{cores} cores, {len(store)} images, batches of {arguments.batch}:\n\n" + "\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
