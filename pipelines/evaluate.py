"""Judging one fold on its stored test episodes beside the baselines, as a stage.

python -m pipelines.evaluate --dataset pascal --source data/VOC2012 --folds 0
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.draw import EPISODES, DrawnTest, DrawnTraining, read_test
from pipelines.results import EpisodeOutcome, FoldResult, Score
from pipelines.train import TrainedFold

if TYPE_CHECKING:
    import torch

    from mshnet.data.batches import EpisodeBatch, EpisodeLoader
    from mshnet.data.episodes import Episode
    from mshnet.engine import Evaluation, Predictor
    from mshnet.features import FeatureCache

CODE_VERSION = 2
"""Raise it when the same weights would give other numbers or pictures."""
TRAINED = "trained"
CURVES, BARS = "curves.png", "classes.png"


def stage(config: CrossValidationConfig, drawn: tuple[Stage, Stage], trained: Stage, fold: int) -> Stage:
    """Evaluate a fold; `drawn` is what it trains and what it is tested on."""
    key = fingerprint("evaluate", CODE_VERSION, drawn[1].key, trained.key, config.evaluation.panels_each)
    folder = storage.join(config.store, "evaluations", f"{config.dataset}-fold{fold}-{key}")
    return Stage(
        name=f"evaluate fold {fold}",
        result=storage.join(folder, "result.json"),
        run=evaluate_fold,
        arguments=(config, folder),
        needs=(*drawn, trained),
        cpus=config.compute.cpus_per_worker,
        gpus=1 if config.compute.use_gpu else 0,
        parts=(CURVES, BARS),
    )


def evaluate_fold(
    config: CrossValidationConfig,
    folder: str,
    training_result: Mapping[str, Any],
    test_result: Mapping[str, Any],
    trained_result: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Scores of the trained network, the untrained one and two training-free baselines, with pictures."""
    import torch

    from mshnet.baselines import best_threshold, foreground, prototype_threshold
    from mshnet.checkpoint import load_model
    from mshnet.data.batches import EpisodeLoader
    from mshnet.data.store.images import ImageStore
    from mshnet.data.tables import read_episodes
    from mshnet.engine import evaluate, network_predictor
    from mshnet.features import FeatureCache
    from pipelines.network import Relation, build_network, inference_backbone

    training, drawn = DrawnTraining.from_json(training_result), DrawnTest.from_json(test_result)
    trained = TrainedFold.from_json(trained_result)
    started = time.monotonic()
    torch.set_num_threads(config.compute.cpus_per_worker)
    device = _device(config)
    store = ImageStore(storage.join(config.store, drawn.store))
    test = read_test(config, drawn, store)
    table = storage.join(config.store, drawn.folder, EPISODES)
    base = read_episodes(table, drawn.episodes_sha256, "threshold")
    model = load_model(storage.join(config.store, trained.model), config.model).to(device)
    untrained = build_network(config).to(device).eval()
    # As in training and validation, and for everything that is judged here.
    backbone = inference_backbone(model.backbone, config.precision)
    features = FeatureCache(backbone, config.compute.feature_cache_bytes)
    names = store.manifest.class_names
    with EpisodeLoader(store, config.compute.loader_processes, device) as loader:
        on_base = _batches(config, loader, base, f"fold {drawn.fold}: baseline's threshold")
        threshold = best_threshold(features, on_base, training.base_classes)
        predictors: dict[str, Predictor] = {
            TRAINED: network_predictor(Relation(model.relation, config.precision)),
            "untrained": network_predictor(Relation(untrained.relation, config.precision)),
            "foreground": foreground,
            "prototype": prototype_threshold(threshold),
        }
        outcomes = evaluate(predictors, features, _batches(config, loader, test, f"fold {drawn.fold}: evaluation"))
        panels = _panels(config, folder, loader, test, outcomes[TRAINED], predictors[TRAINED], features)
    scores = {name: _score(outcome, drawn.novel_classes, names) for name, outcome in outcomes.items()}
    pictures = _pictures(folder, drawn.fold, trained, scores)
    return FoldResult(
        fold=drawn.fold,
        novel_classes=[names[c] for c in drawn.novel_classes],
        score=scores.pop(TRAINED),
        baselines=scores,
        history=trained.history,
        panels=panels,
        curve_picture=pictures[0],
        bars_picture=pictures[1],
        protocol=drawn.protocol,
        selection=training.selection,
        split_lists=training.split_lists,
        best_epoch=trained.best_epoch,
        train_episodes=trained.train_episodes,
        train_s=trained.train_s,
        evaluate_s=time.monotonic() - started,
        run_id=trained.run_id,
        model_version=None,
        checkpoint=trained.model,
        git_commit=trained.git_commit,
    ).to_json()


def _device(config: CrossValidationConfig) -> torch.device:
    import torch

    if config.compute.use_gpu and not torch.cuda.is_available():
        raise InputError("expected a GPU for the evaluation, found none that torch can use; leave out --use-gpu")
    return torch.device("cuda" if config.compute.use_gpu else "cpu")


def _batches(
    config: CrossValidationConfig, loader: EpisodeLoader, episodes: Sequence[Episode[int]], desc: str
) -> Iterator[EpisodeBatch]:
    from ray.experimental import tqdm_ray

    size = config.training.global_batch
    positions = [range(i, min(i + size, len(episodes))) for i in range(0, len(episodes), size)]
    bar = tqdm_ray.tqdm(total=len(positions), desc=desc, flush_interval_s=5)
    try:
        for batch in loader.batches(episodes, positions):
            yield batch
            bar.update()
    finally:
        bar.close()  # or it is drawn to the end of the job


def _score(outcome: Evaluation, classes: Sequence[int], names: Sequence[str]) -> Score:
    from mshnet.metrics import class_iou, fb_iou, miou, sum_by_class

    per_class = sum_by_class(outcome.counts, outcome.class_ids, classes)
    values = zip(classes, class_iou(per_class), strict=True)
    return Score(
        miou=miou(per_class),
        fb_iou=fb_iou(per_class),
        class_iou={names[c]: value for c, value in values if not np.isnan(value)},
        episodes=len(outcome.class_ids),
    )


def _panels(
    config: CrossValidationConfig,
    folder: str,
    loader: EpisodeLoader,
    episodes: Sequence[Episode[int]],
    outcome: Evaluation,
    predict: Predictor,
    features: FeatureCache,
) -> list[EpisodeOutcome]:
    """Pictures of the best, the median and the worst episodes, each query at most once."""
    import torch

    from mshnet.visualize import episode_panel, png_bytes

    store = loader.store
    iou = outcome.counts.intersection[:, 1] / np.maximum(outcome.counts.union[:, 1], 1)
    ranked = _ranked(iou, [e.query for e in episodes], config.evaluation.panels_each)
    panels = []
    for (rank, index), batch in zip(ranked, loader.batches(episodes, [[index] for _, index in ranked]), strict=True):
        with torch.no_grad():
            predicted = predict(*features.of(batch), batch)[0].cpu().numpy()
        episode = episodes[index].named(store.image_id)
        name = store.manifest.class_names[episode.class_id]
        picture = episode_panel(
            _pixels(batch.query_images[0]),
            batch.query_masks[0].cpu().numpy(),
            predicted,
            [
                (_pixels(image), mask.cpu().numpy() > 0)
                for image, mask in zip(batch.support_images[0], batch.support_masks[0], strict=True)
            ],
            name,
            f"{rank}: {episode.query}",
        )
        file = f"{rank}-{index:05d}.png"
        storage.write_bytes(storage.join(folder, file), png_bytes(picture))
        panels.append(
            EpisodeOutcome(
                query=episode.query,
                supports=list(episode.supports),
                class_name=name,
                iou=float(iou[index]),
                picture=file,
                rank=rank,
            )
        )
    return panels


def _pictures(folder: str, fold: int, trained: TrainedFold, scores: Mapping[str, Score]) -> tuple[str, str]:
    from mshnet.visualize import class_bars, learning_curves

    curve = [(record.epoch, record.loss, record.validation_miou) for record in trained.history]
    storage.write_bytes(storage.join(folder, CURVES), learning_curves({f"fold {fold}": curve}))
    bars = class_bars({name: score.class_iou for name, score in scores.items()})
    storage.write_bytes(storage.join(folder, BARS), bars)
    return CURVES, BARS


def _ranked(iou: np.ndarray, queries: Sequence[int], each: int) -> list[tuple[str, int]]:
    order = [int(i) for i in np.argsort(-iou, kind="stable")]
    # From the median outwards, so that the first one found is the nearest.
    middle = sorted(order, key=lambda i: abs(order.index(i) - len(order) // 2))
    chosen: list[tuple[str, int]] = []
    shown: set[int] = set()
    for rank, candidates in (("best", order), ("median", middle), ("worst", order[::-1])):
        fresh: list[tuple[str, int]] = []
        for index in candidates:
            if len(fresh) < each and queries[index] not in shown:
                shown.add(queries[index])
                fresh.append((rank, index))
        chosen += fresh
    return chosen


def _pixels(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).cpu().numpy()


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate only: the job's stages up to the folds' numbers."""
    from pipelines.job import run_stages

    return run_stages(
        argv,
        "python -m pipelines.evaluate",
        "Evaluate the folds (and train those that are not).",
        lambda graph: graph.evaluated,
    )


if __name__ == "__main__":
    raise SystemExit(main())
