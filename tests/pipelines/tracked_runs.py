"""Cross-validations as the tables read them: hand-made numbers, in memory or in a tracker."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import count
from typing import Any

from mshnet.config import ModelConfig
from pipelines import recipes
from pipelines.config import CrossValidationConfig
from pipelines.results import CrossValidation, FoldResult, Interval, mean
from pipelines.tracking import Tracker, flattened
from pipelines.tracking_search import TrackedRun
from tests.pipelines.recorded_example import DATA, fold_result, protocol

HALF_WIDTH = 0.008
"""Of the means' intervals, IoU from 0 to 1."""
_started = count(1_700_000_000_000, 60_000)


def configuration(
    backbone: str = "resnet50",
    shot: int = 1,
    similarity: str = "both",
    architecture: str = "mshnet",
    dataset: str = "pascal",
    **changes: Any,
) -> CrossValidationConfig:
    """The paper's training of a cell."""
    model: Any = {"backbone": backbone, "similarity": similarity, "architecture": architecture}
    return dataclasses.replace(recipes.paper(dataset), shot=shot, model=ModelConfig(**model), **changes)


def folds(config: CrossValidationConfig, miou: Sequence[float], **of_protocol: Any) -> list[FoldResult]:
    """A result for each number, measured by the paper's protocol with those fields changed."""
    measured = protocol(config, **of_protocol)
    return [
        dataclasses.replace(fold_result(config, fold, value, protocol=measured), run_id=f"fold-run-{fold}")
        for fold, value in enumerate(miou)
    ]


def tracked(
    config: CrossValidationConfig,
    miou: Sequence[float],
    run_id: str,
    status: str = "FINISHED",
    data: str = DATA,
    weights: str = "imagenet",
    **of_protocol: Any,
) -> TrackedRun:
    """A cross-validation as if read from a tracker; each was started a minute after the one before."""
    centre = mean(list(miou)) if miou else 0.0
    finished = status == "FINISHED"
    return TrackedRun(
        run_id=run_id,
        experiment_id="7",
        name=f"{config.dataset} {config.shot}-shot",
        status=status,
        started_ms=next(_started),
        params=flattened(config.to_json()),
        tags={"fingerprint.data": data, "fingerprint.backbone_weights": weights},
        folds=tuple(folds(config, miou, **of_protocol)) if finished else (),
        miou_interval=Interval(low=centre - HALF_WIDTH, high=centre + HALF_WIDTH) if finished else None,
    )


def log_run(config: CrossValidationConfig, miou: Sequence[float], key: str, status: str = "FINISHED") -> TrackedRun:
    """A parent run with a child per fold in the tracker, with no more of each than the tables read; what to find."""
    tracker = Tracker(config.tracking_uri, config.experiment)
    tags = {"fingerprint.data": DATA, "fingerprint.backbone_weights": "imagenet"}
    name = f"{config.dataset} {config.shot}-shot"
    parent = tracker.start_parent(name, config.to_json(), tags, key)
    results = []
    for result in folds(config, miou):
        fold = str(result.fold)
        child = tracker.start_child(parent, f"fold {fold}", {}, {"fold": fold}, f"{key}-{fold}")
        results.append(dataclasses.replace(result, run_id=child))
        tracker.log_bytes(child, results[-1].to_text().encode(), "fold.json")
        tracker.finish(child, status)
    run = tracked(config, miou, parent, status)
    if status == "FINISHED":
        tracker.log_bytes(parent, _whole(config, results, run).to_text().encode(), "cross_validation.json")
    tracker.finish(parent, status)
    return dataclasses.replace(run, folds=tuple(results) if run.folds else ())


def _whole(config: CrossValidationConfig, results: list[FoldResult], run: TrackedRun) -> CrossValidation:
    return CrossValidation(
        name=run.name,
        dataset=config.dataset,
        backbone=config.model.backbone,
        similarity=config.model.similarity,
        shot=config.shot,
        image_size_px=config.images.image_size_px,
        folds=results,
        mean_miou=mean([fold.score.miou for fold in results]),
        mean_fb_iou=mean([fold.score.fb_iou for fold in results]),
        parent_run_id=run.run_id,
        config=config.to_json(),
        fingerprints={},
        git_commit="unknown",
        versions={},
        learnable_parameters=0,
        miou_interval=run.miou_interval,
    )
