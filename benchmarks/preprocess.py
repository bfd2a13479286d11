"""Preprocessing measured: speed, memory and how both grow, against a plain loop on the same images.

    python benchmarks/coco_scale.py --out data/coco5k --images 5000
    python benchmarks/coco_scale.py --out data/coco20k
    eval "$(infra/object_store.sh env)"                                # for an s3:// store
    python benchmarks/preprocess.py --small data/coco5k --large data/coco20k --store s3://mshnet/bench

Each run is the real command, `python -m pipelines.preprocess`, in a local Ray cluster of 2 or 1 workers, into a folder
of its own below --store that is removed afterwards. The processes are watched from outside, by their titles:
/proc/PID/smaps_rollup once a second, the scan task five times as often. Shorter peaks are seen in the driver's resident
size alone, of which the kernel keeps the highest. The loop is one process that does what a script would: pycocotools'
index of the annotations, then for each image Pillow's open, resize and save, the union of annToMask per class, one JPEG
and one PNG per class written to a local folder; sizes, JPEG quality and the masks' bit depth are the store's.

Takes about 12 minutes on two cores for 5,000 and 20,000 images. Results: docs/benchmarks/episode_store.md.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tyro

from mshnet.data.filesystem import filesystem
from pipelines.storage import absolute

REPOSITORY = Path(__file__).resolve().parents[1]
SUBSETS = ("train", "val")
SIDE_PX, JPEG_QUALITY = 473, 95
"""What the command's defaults are."""
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure, on what."""

    small: Path
    """Data set of benchmarks/coco_scale.py."""
    large: Path
    """The same generator's, larger."""
    store: str = ""
    """Folder or URI to write below; empty: a temporary local folder."""
    images_per_shard: int = 1250
    """So that every worker has equally many shards, at both sizes."""
    startup_images: int = 60
    """Size of the set whose time stands for what does not grow: processes starting, imports."""
    repetitions: int = 1
    """Of everything; times are medians, peaks the highest."""


@dataclass(kw_only=True)
class Run:
    """One run of the command, or of the loop."""

    images: int = 0
    seconds: float = 0.0
    scan_s: float = 0.0
    shards_s: float = 0.0
    images_per_class: Mapping[str, int] = field(default_factory=dict)
    peaks: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """(USS, PSS, resident size) in bytes by kind of process: each the highest of a single process."""


class Watch(threading.Thread):
    """Samples a process and all below it until it ends."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.peaks: dict[str, tuple[int, int, int]] = {}
        self.seen: dict[str, tuple[float, float]] = {}
        """First and last time that a kind of process was there."""

    def run(self) -> None:
        next_memory = 0.0
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            now = time.monotonic()
            measure = now >= next_memory
            if measure:
                next_memory = now + 1
            for process in self._tree():
                try:
                    kind = self._kind(process)
                    self.seen[kind] = (self.seen.get(kind, (now, now))[0], now)
                    # The scan is over in seconds.
                    if kind == "scan" or (measure and kind in ("driver", "shard")):
                        self._measure(process, kind)
                except (psutil.Error, FileNotFoundError, ProcessLookupError):
                    continue  # it has just ended
            time.sleep(0.2)

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.Error:
            return []

    def _kind(self, process: psutil.Process) -> str:
        if process.pid == self.process.pid:
            return "driver"
        title = " ".join(process.cmdline()[:1])
        return "scan" if title.startswith("ray::scan") else "shard" if title.startswith("ray::preprocess") else "other"

    def _measure(self, process: psutil.Process, kind: str) -> None:
        memory = process.memory_full_info()
        highest = _highest_resident(process.pid) if kind == "driver" else memory.rss
        old = self.peaks.get(kind, (0, 0, 0))
        self.peaks[kind] = (max(old[0], memory.uss), max(old[1], memory.pss), max(old[2], memory.rss, highest))

    def lasted(self, kind: str) -> float:
        first, last = self.seen.get(kind, (0.0, 0.0))
        return last - first


def _highest_resident(pid: int) -> int:
    # Not for workers: one process may have done several things, and the kernel has one mark.
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def command(source: Path, store: str, images_per_shard: int, workers: int) -> Run:
    """Run the real command and watch it."""
    line = [
        sys.executable, "-m", "pipelines.preprocess", "--dataset", "coco", "--source", str(source.resolve()),
        "--store", store, "--images-per-shard", str(images_per_shard),
    ]  # fmt: skip
    environment = os.environ | {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": workers}), "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryFile("w+") as log:
        started = time.monotonic()
        with subprocess.Popen(
            line, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process:
            watch = Watch(psutil.Process(process.pid))
            watch.start()
            out, _ = process.communicate()
            seconds = time.monotonic() - started
        watch.join()
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(line)}: exit code {process.returncode}\n{log.read()[-4000:]}")
    summary = json.loads(out.splitlines()[-1])
    fs, path = filesystem(f"{summary['store']}/manifest.json")
    return Run(
        images=summary["images"],
        seconds=seconds,
        scan_s=watch.lasted("scan"),
        shards_s=watch.lasted("shard"),
        images_per_class=json.loads(fs.cat_file(path))["images_per_class"],
        peaks=watch.peaks,
    )


def loop(source: Path) -> Run:
    """Run the plain loop in a process of its own and watch it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as out:
        process = context.Process(target=_loop, args=(source, Path(out), theirs))
        process.start()
        assert process.pid is not None
        watch = Watch(psutil.Process(process.pid))
        watch.start()
        images, parse_s, shards_s, counts = ours.recv()
        process.join()
        watch.join()
    return Run(
        images=images,
        seconds=parse_s + shards_s,
        scan_s=parse_s,
        shards_s=shards_s,
        images_per_class=counts,
        peaks=watch.peaks,
    )


def _loop(source: Path, out: Path, report: Any) -> None:
    import contextlib

    import numpy as np
    from PIL import Image
    from pycocotools.coco import COCO

    images, parse_s, loop_s = 0, 0.0, 0.0
    counts: Counter[str] = Counter()
    for subset in SUBSETS:
        started = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            coco = COCO(source / "annotations" / f"instances_{subset}2014.json")
        parsed = time.monotonic()
        for image_id in coco.getImgIds():
            annotations = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
            if not annotations:
                continue
            name = coco.imgs[image_id]["file_name"]
            with Image.open(source / f"{subset}2014" / name) as picture:
                resized = picture.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
            resized.save(out / name, quality=JPEG_QUALITY, subsampling=0)
            masks: dict[int, np.ndarray] = {}
            for annotation in annotations:
                category = annotation["category_id"]
                mask = coco.annToMask(annotation)
                masks[category] = masks[category] | mask if category in masks else mask
            for category, mask in masks.items():
                if mask.any():
                    counts[coco.cats[category]["name"]] += 1
                    Image.fromarray(mask.astype(bool)).save(out / f"{name}-{category}.png")
            images += 1
        parse_s += parsed - started
        loop_s += time.monotonic() - parsed
    report.send((images, parse_s, loop_s, dict(counts)))


def together(runs: Iterable[Run]) -> Run:
    """Median times and highest peaks of repetitions."""
    every = list(runs)

    def median(name: str) -> float:
        return float(sorted(getattr(run, name) for run in every)[(len(every) - 1) // 2])

    peaks: dict[str, tuple[int, int, int]] = {}
    for run in every:
        for kind, found in run.peaks.items():
            old = peaks.get(kind, (0, 0, 0))
            peaks[kind] = (max(old[0], found[0]), max(old[1], found[1]), max(old[2], found[2]))
    return Run(
        images=every[0].images,
        seconds=median("seconds"),
        scan_s=median("scan_s"),
        shards_s=median("shards_s"),
        images_per_class=every[0].images_per_class,
        peaks=peaks,
    )


def speed_table(runs: Mapping[str, Run], plain: Run, constant_s: float) -> str:
    """Images a second of every run, as ratios to the loop's: all of it, without what is constant, pictures alone."""
    columns = ("images", "s", "of it annotations", "pictures", "images/s", "× loop")
    columns += ("less constant", "× loop", "pictures alone", "× loop")
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for label, run in {"plain loop, 1 process": plain, **runs}.items():
        constant = 0.0 if run is plain else constant_s
        cells = [str(run.images), f"{run.seconds:.1f}", f"{run.scan_s:.1f}", f"{run.shards_s:.1f}"]
        for seconds, base_s in (
            (run.seconds, plain.seconds),
            (run.seconds - constant, plain.seconds),
            (run.shards_s, plain.shards_s),
        ):
            rate = run.images / seconds
            cells += [f"{rate:.1f}", f"{rate * base_s / plain.images:.2f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(runs: Mapping[str, Run]) -> str:
    """Peaks of single processes in MiB: USS / PSS / resident."""
    kinds = ("driver", "scan", "shard")
    lines = ["| MiB: USS / PSS / resident | driver | scan task | shard task |", "| --- | ---: | ---: | ---: |"]
    for label, run in runs.items():
        cells = [" / ".join(f"{v / MIB:.0f}" for v in run.peaks[k]) if k in run.peaks else "–" for k in kinds]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def growth_table(small: Run, large: Run, constant_s: float) -> str:
    """How time and memory grow from the small set to the large one."""
    images = large.images / small.images
    whole = large.seconds / small.seconds
    without = (large.seconds - constant_s) / (small.seconds - constant_s)
    rows = [
        ("images", images, 1.0),
        ("time, whole", whole, whole / images),
        (f"time, less the {constant_s:.1f} s of a tiny set", without, without / images),
        ("time, pictures", large.shards_s / small.shards_s, large.shards_s / small.shards_s / images),
    ]
    lines = ["| | large / small | relative to linear |", "| --- | ---: | ---: |"]
    lines += [f"| {label} | {ratio:.3f} | {relative:.3f} |" for label, ratio, relative in rows]
    for kind in ("driver", "shard"):
        lines.append(f"| {kind}, peak USS | {large.peaks[kind][0] / small.peaks[kind][0]:.3f} | |")
    return "\n".join(lines)


def main() -> None:
    """Measure, then print the tables."""
    arguments = tyro.cli(Arguments, description=__doc__)
    scratch = Path(tempfile.mkdtemp(prefix="mshnet-benchmark-"))
    try:
        _measure(arguments, scratch)
    finally:
        shutil.rmtree(scratch)


def _measure(arguments: Arguments, scratch: Path) -> None:
    tiny = scratch / "tiny"
    generator = [sys.executable, str(REPOSITORY / "benchmarks" / "coco_scale.py"), "--out", str(tiny)]
    generator += ["--images", str(arguments.startup_images)]
    subprocess.run(generator, check=True, stdout=sys.stderr, stderr=subprocess.DEVNULL)
    plan = {
        "tiny set, 2 workers": (tiny, 2),
        "small set, 2 workers": (arguments.small, 2),
        "small set, 1 worker": (arguments.small, 1),
        "large set, 2 workers": (arguments.large, 2),
    }
    runs: dict[str, list[Run]] = {label: [] for label in plan}
    plain: list[Run] = []
    for repetition in range(arguments.repetitions):
        plain.append(loop(arguments.small))
        print(f"plain loop: {plain[-1].seconds:.1f} s", file=sys.stderr, flush=True)
        for number, (label, (source, workers)) in enumerate(plan.items()):
            store = f"{absolute(arguments.store or str(scratch))}/preprocess-{os.getpid()}-{repetition}-{number}"
            try:
                # As few images in as many processes: the tiny set has two shards too.
                per_shard = -(-arguments.startup_images // 2) if source == tiny else arguments.images_per_shard
                runs[label].append(command(source, store, per_shard, workers))
            finally:
                fs, path = filesystem(store)
                if fs.exists(path):
                    fs.rm(path, recursive=True)
            print(f"{label}: {runs[label][-1].seconds:.1f} s", file=sys.stderr, flush=True)
    found = {label: together(every) for label, every in runs.items()}
    base = together(plain)
    constant_s = found.pop("tiny set, 2 workers").seconds
    small, large = found["small set, 2 workers"], found["large set, 2 workers"]
    if base.images_per_class != small.images_per_class:
        raise SystemExit("the loop and the store disagree about which images show which classes: not the same work")
    print(speed_table(found, base, constant_s), end="\n\n")
    print(memory_table({"plain loop": base, **found}), end="\n\n")
    print(growth_table(small, large, constant_s))


if __name__ == "__main__":
    main()
