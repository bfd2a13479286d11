"""Reading episodes measured: our store against plain files, mosaicml-streaming, webdataset and the bare decoder.

    python -m pip install --no-deps --target outputs/benchmark_packages -r benchmarks/requirements.txt
    eval "$(infra/object_store.sh env)"
    PYTHONPATH=outputs/benchmark_packages python benchmarks/reading.py --work outputs/reading --remote s3://mshnet/bench

(--target keeps what is installed there out of .venv and changes no version of requirements.lock.)

Data: 2,000 generated COCO images (benchmarks/coco_scale.py) and 600 VOC ones (mshnet.data.shapes, 500 px), preprocessed
by the real command; --work keeps them for the next time. Episodes: class, query and supports at random among the images
that show 2,048 px of the class; so many that on average each image is visited once. Everybody loads the same ones in
batches of 4, in 2 loader processes, from files that are in the page cache:

- ours: `ImageStore` and `EpisodeLoader`, as training uses them; uint8 tensors.
- plain files: what the published code does. Pillow opens and resizes (bilinear) the original JPEG, ToTensor and
  Normalize on the CPU; the mask from a label PNG (VOC) or, instance by instance, from polygons (COCO), to float,
  resized by nearest neighbour. The annotations lie parsed in memory, which is kind to it.
- mosaicml-streaming by index: MDS shards of 64 MiB with the very bytes of our rows, one sample an image, read at random
  by `dataset[row]`, as ours is.
- mosaicml-streaming and webdataset in order: one sample an episode, its bytes copied once per visit, in the order in
  which they are read: what these formats are made for. Shards of 64 MiB; only the masks that an episode needs.
- bare decoding: as many processes decode the same bytes from a list, and hand nothing on.

All but the plain files decode with the same functions, `mshnet.data.store.decode`, and end in the same batch type. The
clock starts when every loader process is up and ends with the last batch. Cold: the local cache is empty (the server's
files are in the page cache too); webdataset streams from S3 by a handler that reads with s3fs as we do. Warm: what was
fetched by a pass before. Contenders take turns, --repetitions times; the table has medians, and the lowest and highest.
Takes about 25 minutes on two cores. Results: docs/benchmarks/episode_store.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from episode_formats import MEAN, STD, MdsEpisodes, MdsRows, write_samples
from reading_contenders import BARE, CONTENDERS, DataSet, Task, bare, measured

from mshnet.data.batches import EpisodeLoader
from mshnet.data.episodes import Episode
from mshnet.data.filesystem import filesystem
from mshnet.data.store.images import ImageStore

REPOSITORY = Path(__file__).resolve().parents[1]
MIN_OBJECT_PX = 2048
Where = Literal["local", "S3 cold", "S3 warm"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure, where."""

    work: Path
    """Folder for generated data, stores and the other formats: about 3 GB."""
    remote: str = ""
    """URI on object storage to copy to and read from; empty: local only."""
    images: int = 2000
    """Generated COCO images."""
    voc_images: int = 600
    """Generated VOC images."""
    shots: tuple[int, ...] = (1, 5)
    """Supports per episode."""
    batch: int = 4
    """Episodes in a batch."""
    processes: int = 2
    """Loader processes."""
    repetitions: int = 3
    """Of every measurement, in turns."""
    seed: int = 0
    """Of the episodes."""


@dataclass(kw_only=True)
class Measured:
    """Seconds of each repetition, for one contender in one place."""

    episodes: int
    images: int
    seconds: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    """To the first batch."""


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


# Measuring


def check_same(task: Task) -> None:
    """Raise SystemExit unless the contenders give the same pixels for the first episodes."""
    episodes = task.episodes[:4]
    loader = EpisodeLoader(ImageStore(task.store))
    expected = list(loader.batches(episodes, [[i] for i in range(len(episodes))]))
    load = task.plain_files()
    plain = [load(episode) for episode in episodes]
    for a, b in zip(expected, plain, strict=True):
        masks = a.support_masks == b.support_masks.to(torch.uint8)
        pixels = (b.support_images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
        if not masks.all() or (pixels - a.support_images).abs().mean() > 4:
            raise SystemExit("the plain files' episodes are not the store's")
    if task.data == "coco":
        rows = MdsRows(task.mds("mds_images"))
        streams: tuple[Any, ...] = (MdsEpisodes(task.mds(f"mds_{task.shot}shot")), task.tars())
        for others in ([rows(e) for e in episodes], *([b for b, _ in zip(s, episodes, strict=False)] for s in streams)):
            for a, b in zip(expected, others, strict=True):
                if not (torch.equal(a.query_images, b.query_images) and torch.equal(a.query_masks, b.query_masks)):
                    raise SystemExit("another format's episodes are not the store's")


def draw(store: ImageStore, shot: int, seed: int) -> tuple[Episode[int], ...]:
    """As many episodes as visit each image once on average."""
    rng = np.random.default_rng((seed, shot))
    pools: dict[int, list[int]] = {}
    for row, (_, _, pixels) in enumerate(store.contents()):
        for class_id, count in pixels.items():
            if count >= MIN_OBJECT_PX:
                pools.setdefault(class_id, []).append(row)
    classes = [c for c in sorted(pools) if len(pools[c]) > shot]
    episodes = []
    for _ in range(max(8, len(store) // (shot + 1))):
        class_id = classes[int(rng.integers(len(classes)))]
        query, *supports = rng.choice(pools[class_id], shot + 1, replace=False).tolist()
        episodes.append(Episode(query, tuple(supports), class_id))
    return tuple(episodes)


# Data


def prepare(arguments: Arguments, data: DataSet) -> tuple[Path, Path]:
    """Generate and preprocess what is not there yet; gives the source and the folder of its image store."""
    work = arguments.work.resolve()
    source, stores = work / f"{data}_source", work / f"{data}_store"
    out = ["--out", str(source), "--images", str(arguments.images if data == "coco" else arguments.voc_images)]
    generator = {
        "coco": [sys.executable, str(REPOSITORY / "benchmarks" / "coco_scale.py"), *out],
        "voc": [sys.executable, "-m", "mshnet.data.shapes", "--layout", "voc", "--size-px", "500", *out],
    }[data]
    subprocess.run(generator, check=True, stdout=sys.stderr)
    line = [sys.executable, "-m", "pipelines.preprocess", "--dataset", "coco" if data == "coco" else "pascal"]
    line += ["--source", str(source), "--store", str(stores), "--images-per-shard", "500"]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    return source, Path(json.loads(done.stdout.splitlines()[-1])["store"])


def upload(local: Path, remote: str) -> None:
    """Copy a folder, in the place of what is there."""
    fs, root = filesystem(remote)
    if fs.exists(root):
        fs.rm(root, recursive=True)
    for path in sorted(p for p in local.rglob("*") if p.is_file()):
        fs.put_file(str(path), f"{root.rstrip('/')}/{path.relative_to(local)}")


def measure_all(arguments: Arguments, data: DataSet) -> dict[tuple[int, Where, str], Measured]:
    """Every contender in every place, in turns."""
    source, images = prepare(arguments, data)
    store = ImageStore(str(images))
    drawn = {shot: draw(store, shot, arguments.seed) for shot in arguments.shots}
    shots = "-".join(map(str, arguments.shots))
    samples = arguments.work.resolve() / f"{data}_samples" / f"{images.name}-{arguments.seed}-{shots}"
    names = [*CONTENDERS] if data == "coco" else ["ours", "plain files, as published"]
    if data == "coco":
        write_samples(samples, images, drawn)
    base = arguments.remote.rstrip("/")
    if base and data == "coco":
        upload(images, f"{base}/reading/images")
        upload(samples, f"{base}/reading/samples")
    found: dict[tuple[int, Where, str], Measured] = {}
    cache = arguments.work.resolve() / "cache"
    for shot, episodes in drawn.items():
        local = Task(
            data=data, source=source, store=str(images), samples=str(samples), cache=cache,
            shot=shot, episodes=episodes, batch=arguments.batch, processes=arguments.processes,
        )  # fmt: skip
        check_same(local)
        remote = Task(**{**vars(local), "store": f"{base}/reading/images", "samples": f"{base}/reading/samples"})
        for repetition in range(arguments.repetitions):
            for name in (*names, BARE):
                _note(found, (shot, "local", name), local, bare(local) if name == BARE else measured(name, local))
            for name in names if base and data == "coco" else ():
                if name == "plain files, as published":
                    continue
                _empty(cache, keep=name != "webdataset in order")
                _note(found, (shot, "S3 cold", name), remote, measured(name, remote))
                if name == "webdataset in order":  # without a folder for it, it kept nothing
                    _empty(cache)
                    measured(name, remote)
                _note(found, (shot, "S3 warm", name), remote, measured(name, remote))
            print(f"{data}, {shot}-shot: repetition {repetition + 1} done", file=sys.stderr, flush=True)
    _empty(cache, keep=False)
    return found


def _empty(cache: Path, keep: bool = True) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    if keep:
        cache.mkdir()


def _note(
    found: dict[tuple[int, Where, str], Measured], key: tuple[int, Where, str], task: Task, seconds: tuple[float, float]
) -> None:
    episodes = len(task.episodes)
    entry = found.setdefault(key, Measured(episodes=episodes, images=episodes * (1 + task.shot)))
    entry.first_s.append(seconds[0])
    entry.seconds.append(seconds[1])


def table(found: Mapping[tuple[int, Where, str], Measured]) -> str:
    """Medians, and ratios to what stands first in each place."""
    lines = [
        "| shots | from | | episodes/s | images/s (lowest, highest) | 1st batch, s | ours / this | of bare decoding |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (shot, where, name), entry in sorted(found.items(), key=lambda item: item[0][:2]):
        seconds = _median(entry.seconds)
        rates = [entry.images / s for s in (max(entry.seconds), min(entry.seconds))]
        ratio = seconds / _median(found[shot, where, "ours"].seconds)
        share = _median(found[shot, "local", BARE].seconds) / seconds
        first = "" if name == BARE else f"{_median(entry.first_s):.2f}"
        lines.append(
            f"| {shot} | {where} | {name} | {entry.episodes / seconds:.1f} | {entry.images / seconds:.0f} "
            f"({rates[0]:.0f}, {rates[1]:.0f}) | {first} | {ratio:.2f} | {share:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure both data sets and print a table of each."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.work.mkdir(parents=True, exist_ok=True)
    titles: dict[DataSet, str] = {"coco": "COCO layout", "voc": "VOC layout"}
    for data, title in titles.items():
        print(f"{title}:\n\n{table(measure_all(arguments, data))}\n", flush=True)


if __name__ == "__main__":
    main()
