"""What bfloat16 costs a trained network: the same weights and episodes judged in float32 and in bfloat16.

    python benchmarks/precision.py --models outputs/store/folds/*/model --images outputs/store/images/NAME \\
        --split-lists DIR --episodes 300

Each model's fold is judged on its published test episodes. The table has the mIoU of both precisions and the share of
pixels on which their masks agree. Results: docs/benchmarks/training_speed.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from mshnet.backbone import Features, InferenceBackbone
from mshnet.checkpoint import load_model, read_config
from mshnet.data.batches import EpisodeBatch, EpisodeLoader
from mshnet.data.episodes import Episode, published_episodes
from mshnet.data.folds import novel_classes
from mshnet.data.splits import read_split_lists
from mshnet.data.store.images import ImageStore
from mshnet.engine import evaluate, network_predictor
from mshnet.features import FeatureCache
from mshnet.metrics import miou, sum_by_class
from mshnet.outcomes import Outcomes
from pipelines.network import Relation

BATCH = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Arguments:
    """What to judge."""

    models: tuple[Path, ...]
    """Folders of trained folds."""
    images: str
    """A store at the models' image size."""
    split_lists: str
    """The field's list files."""
    dataset: str = "pascal"
    """pascal or coco."""
    episodes: int = 300
    """Of each fold."""
    threads: int = 2
    """CPU threads."""


def main() -> None:
    given = tyro.cli(Arguments, description=__doc__.splitlines()[0])
    torch.set_num_threads(given.threads)
    store = ImageStore(given.images)
    print("| fold | mIoU, float32 | mIoU, bfloat16 | masks agree |\n| ---: | ---: | ---: | ---: |")
    for folder in given.models:
        fold = int(read_config(str(folder))["fold"])
        val = read_split_lists(given.dataset, given.split_lists, fold).val
        drawn = published_episodes(given.dataset, val, fold, shot=1, count=given.episodes, skip_small_classes=True)
        episodes = [Episode(store.row(e.query), tuple(map(store.row, e.supports)), e.class_id) for e in drawn]
        masks: dict[str, list[Tensor]] = {}
        scores = []
        for precision in DTYPES:
            outcome, masks[precision] = judged(folder, precision, store, episodes)
            counts = sum_by_class(outcome.counts, outcome.class_ids.tolist(), novel_classes(given.dataset, fold))
            scores.append(100 * miou(counts))
        pairs = zip(*masks.values(), strict=True)
        agree = torch.cat([(one == other).flatten() for one, other in pairs]).float().mean().item()
        print(f"| {fold} | {scores[0]:.2f} | {scores[1]:.2f} | {100 * agree:.2f}% |", flush=True)


def judged(
    folder: Path, precision: str, store: ImageStore, episodes: list[Episode[int]]
) -> tuple[Outcomes, list[Tensor]]:
    """A model at one precision: its counts, and its masks batch by batch."""
    model = load_model(str(folder)).eval()
    predict = network_predictor(Relation(model.relation, precision))
    masks: list[Tensor] = []

    def remember(query: Features, support: Features, batch: EpisodeBatch) -> Any:
        segmented = predict(query, support, batch)
        masks.append(segmented.masks((batch.query_masks.shape[-2], batch.query_masks.shape[-1])))
        return segmented

    features = FeatureCache(InferenceBackbone(model.backbone, DTYPES[precision]), 2**30)
    positions = [range(i, min(i + BATCH, len(episodes))) for i in range(0, len(episodes), BATCH)]
    with EpisodeLoader(store) as loader:
        return evaluate({"network": remember}, features, loader.batches(episodes, positions))["network"], masks


if __name__ == "__main__":
    main()
