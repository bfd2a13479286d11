"""The published test episodes judged with and without the feature cache: the same counts, and the time that it saves.

    python benchmarks/evaluation.py --data DIR/VOC2012 --backbone-weights WEIGHTS --out DIR
    ... --episodes 1000 --shot 5 --record docs/benchmarks/evaluation.md

DATA is VOC in its usual layout with its list files in splits_hsnet/. The episodes are the published draw's of one fold;
the network is untrained, whose time is a trained one's. Each way is a process of its own on --threads cores, all ways
image by image, batches of --batch episodes, features in float32:

    nothing kept    every visit of an image computes its features
    memory          the least recently used go, beyond --memory-gib
    memory, disk    they go to files, up to --disk-gib

The counts of all episodes must be the same integers in all of them; ends with code 1 where not. *Backbone work*: how
often the backbone ran; *its part*: of the seconds. Seconds are the clock's from the first batch to the last count;
memory is the highest resident size less that before the first batch.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from mshnet.backbone import Features
from mshnet.config import ImageFormat
from mshnet.data.batches import EpisodeLoader
from mshnet.data.episodes import Episode, published_episodes
from mshnet.data.splits import read_split_lists
from mshnet.data.store.images import ImageStore
from mshnet.engine import evaluate, network_predictor
from mshnet.feature_files import FeatureFiles
from mshnet.features import FeatureCache, ImageFeatures
from mshnet.outcomes import Judged, read_outcomes, write_outcomes
from pipelines import preprocess, scan, storage
from pipelines.config import CrossValidationConfig
from pipelines.dag import Stage
from pipelines.evaluation_worker import feature_key, rows_needed_again
from pipelines.network import build_network, inference_backbone

Way = Literal["nothing kept", "memory", "memory, disk"]
WAYS: tuple[Way, ...] = ("nothing kept", "memory", "memory, disk")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """On what, and how much of it."""

    data: Path
    """VOC2012 in its usual layout, with splits_hsnet/."""
    backbone_weights: str
    """As for the pipelines."""
    out: Path
    """Folder for the store and the outcomes; used again where it is there."""
    fold: int = 0
    shot: int = 5
    episodes: int = 1000
    image_size_px: int = 473
    batch: int = 8
    """Episodes that go through the network together."""
    threads: int = 2
    memory_gib: float = 4.0
    disk_gib: float = 16.0
    way: Literal["all", "nothing kept", "memory", "memory, disk"] = "all"
    """One of them alone, in this process, its numbers as JSON: what the others are started with."""
    record: str = ""
    """Markdown file that the table is appended to."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way."""

    seconds: float
    backbone_s: float
    asked: int
    computed: int
    from_memory: int
    from_disk: int
    distinct: int
    memory_bytes: int
    disk_bytes: int


class Timed:
    """A backbone with a clock."""

    def __init__(self, backbone: ImageFeatures) -> None:
        self.backbone, self.seconds = backbone, 0.0

    def __call__(self, images: torch.Tensor) -> Features:
        started = time.monotonic()
        features = self.backbone(images)
        self.seconds += time.monotonic() - started
        return features


def main() -> None:
    """Judge in each way, compare, print the table."""
    arguments = tyro.cli(Arguments, description=(__doc__ or "").splitlines()[0])
    config = configuration(arguments)
    if arguments.way != "all":
        print(json.dumps(asdict(measured(arguments, config))))
        return
    done(preprocess.stages(config, scan.scan_source(config)))
    found = {way: in_a_process(arguments, way) for way in WAYS}
    same = compare(arguments)
    text = table(arguments, found, same)
    print(text)
    if arguments.record:
        with open(arguments.record, "a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    raise SystemExit(0 if same else 1)


def configuration(arguments: Arguments) -> CrossValidationConfig:
    """Of the store, and of the network."""
    return CrossValidationConfig(
        dataset="pascal",
        source=str(arguments.data),
        split_lists=str(arguments.data / "splits_hsnet"),
        store=str(arguments.out / "store"),
        backbone_weights=arguments.backbone_weights,
        shot=arguments.shot,
        images=ImageFormat(image_size_px=arguments.image_size_px),
    )


def done(stage: Stage) -> Mapping[str, Any]:
    """The stage's result; what is missing is run here."""
    recorded = stage.recorded()
    if recorded is None:
        recorded = stage.run(*stage.arguments, *(done(need) for need in stage.needs))
        storage.write_json(stage.result, recorded)
    return recorded


def in_a_process(arguments: Arguments, way: Way) -> Measured:
    """A process of its own, so that its memory is its own."""
    flags = asdict(replace(arguments, way=way, record=""))
    line = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    ended = subprocess.run([sys.executable, __file__, *line], stdout=subprocess.PIPE, env=environment, check=True)
    return Measured(**json.loads(ended.stdout.splitlines()[-1]))


@torch.no_grad()
def measured(arguments: Arguments, config: CrossValidationConfig) -> Measured:
    """Judge in one way; the outcomes lie beside the store."""
    torch.set_num_threads(arguments.threads)
    store = ImageStore(preprocess.store_uri(config, scan.scan_source(config)))
    episodes = drawn(arguments, store)
    model = build_network(config, store).eval()
    backbone = Timed(inference_backbone(model.backbone, config.precision))
    files = None
    if arguments.way == "memory, disk":
        key = feature_key(model.backbone, config.precision, arguments.threads, store)
        files = FeatureFiles(arguments.out / "features", key, int(arguments.disk_gib * 2**30))
    budget = 0 if arguments.way == "nothing kept" else int(arguments.memory_gib * 2**30)
    again = rows_needed_again([episodes])
    features = FeatureCache(backbone, budget, files, again=again, image_by_image=True)
    positions = [range(i, min(i + arguments.batch, len(episodes))) for i in range(0, len(episodes), arguments.batch)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with EpisodeLoader(store) as loader:
        batches = tqdm(loader.batches(episodes, positions), total=len(positions), desc=arguments.way)
        started = time.monotonic()
        outcomes = evaluate({"untrained": network_predictor(model.relation)}, features, batches)["untrained"]
        seconds = time.monotonic() - started
    queries = tuple(store.image_id(episode.query) for episode in episodes)
    write_outcomes(outcomes_uri(arguments, arguments.way), [Judged("untrained", arguments.shot, 0, queries, outcomes)])
    held = files.held_bytes() if files else 0
    if files:
        files.close()
    return Measured(
        seconds=seconds,
        backbone_s=backbone.seconds,
        distinct=len({row for episode in episodes for row in episode.images}),
        memory_bytes=1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        disk_bytes=held,
        asked=features.use.asked,
        **asdict(features.use),
    )


def drawn(arguments: Arguments, store: ImageStore) -> list[Episode[int]]:
    """The published draw, by row."""
    val = read_split_lists("pascal", str(arguments.data / "splits_hsnet"), arguments.fold).val
    found = published_episodes(
        "pascal", val, arguments.fold, arguments.shot, arguments.episodes, skip_small_classes=True
    )
    return [Episode(store.row(e.query), tuple(map(store.row, e.supports)), e.class_id) for e in found]


def outcomes_uri(arguments: Arguments, way: str) -> str:
    """Where a way's counts lie."""
    return str(arguments.out / f"{way.replace(', ', '-').replace(' ', '-')}.arrow")


def compare(arguments: Arguments) -> bool:
    """Whether all ways' counts are the same integers."""
    counts = [read_outcomes(outcomes_uri(arguments, way))[0].outcomes.counts for way in WAYS]
    return all(
        (one.intersection == counts[0].intersection).all() and (one.union == counts[0].union).all() for one in counts
    )


def table(arguments: Arguments, found: Mapping[Way, Measured], same: bool) -> str:
    """Markdown."""
    plain = found["nothing kept"]
    lines = [
        f"{arguments.episodes} episodes, {arguments.shot}-shot, fold {arguments.fold}, {arguments.image_size_px} px, "
        f"batches of {arguments.batch}, {arguments.threads} core(s) ({platform.processor() or platform.machine()}), "
        f"torch {torch.__version__}. {plain.asked:,} visits to {plain.distinct} images: at best "
        f"{plain.asked / plain.distinct:.1f} times less backbone work. Counts of all episodes: "
        f"{'the same integers in all ways' if same else '**not the same**'}.",
        "",
        "| | seconds | times faster | its part | backbone work | less by | from memory | from disk | memory | disk |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, each in found.items():
        lines.append(
            f"| {way} | {each.seconds:.0f} | {plain.seconds / each.seconds:.2f} "
            f"| {100 * each.backbone_s / each.seconds:.0f}% | {each.computed:,} | {plain.computed / each.computed:.1f} "
            f"| {100 * each.from_memory / each.asked:.1f}% | {100 * each.from_disk / each.asked:.1f}% "
            f"| {each.memory_bytes / 2**30:.1f} GiB | {each.disk_bytes / 2**30:.1f} GiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
