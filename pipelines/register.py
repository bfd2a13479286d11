"""A fold's numbers and pictures to its MLflow run, its model to the registry, as a stage.

python -m pipelines.register --dataset pascal --source data/VOC2012 --folds 0
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.draw import DrawnTest, DrawnTraining
from pipelines.results import BASELINES, FoldResult, Score
from pipelines.tracking import Tracker
from pipelines.train import TrainedFold

CODE_VERSION = 2
"""Raise it when the same fold would be recorded in another way."""


def stage(
    config: CrossValidationConfig,
    data: str,
    drawn: tuple[Stage, Stage],
    trained: Stage,
    evaluated: Stage,
    fold: int,
    run_id: str,
    job: str,
) -> Stage:
    """Record and register a fold of a job; `data` is the source's fingerprint, `drawn` what it trains and tests on."""
    place = [config.tracking_uri, config.experiment, config.model_name]
    key = fingerprint("register", CODE_VERSION, evaluated.key, job, *place)
    return Stage(
        name=f"register fold {fold}",
        result=storage.join(config.store, "registrations", f"{config.dataset}-fold{fold}-{key}.json"),
        run=register_fold,
        arguments=(config, data, run_id, evaluated.folder),
        needs=(*drawn, trained, evaluated),
        complete=SameRun("run_id", run_id),
    )


@dataclass(frozen=True)
class SameRun:
    """A result counts only for the run that it was logged to: a new tracker gets everything anew."""

    field: str
    run_id: str
    """Empty in a dry run, which starts none."""

    def __call__(self, result: Mapping[str, Any]) -> bool:
        return not self.run_id or bool(result[self.field] == self.run_id)


def register_fold(
    config: CrossValidationConfig,
    data: str,
    run_id: str,
    pictures: str,
    training_result: Mapping[str, Any],
    test_result: Mapping[str, Any],
    trained_result: Mapping[str, Any],
    evaluated_result: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Log the fold, register its weights, move the fold's alias if they are better under the same protocol."""
    training, test = DrawnTraining.from_json(training_result), DrawnTest.from_json(test_result)
    trained = TrainedFold.from_json(trained_result)
    result = FoldResult.from_json(evaluated_result)
    tracker = Tracker(config.tracking_uri, config.experiment)
    # Of weights that an earlier job trained, or where the tracker was away.
    logged = tracker.logged_epochs(run_id)
    for record in trained.history:
        if record.epoch not in logged:
            tracker.log_epoch(run_id, record)
    tracker.log_metrics(run_id, _metrics(result))
    tracker.log_params(run_id, {"drawn": {**_params(training), **_params(test)}})
    for name in (result.curve_picture, result.bars_picture, *(panel.picture for panel in result.panels)):
        tracker.log_bytes(run_id, storage.read_bytes(storage.join(pictures, name)), f"pictures/{name}")
    version = _registered(config, data, tracker, run_id, test, result)
    done = dataclasses.replace(result, run_id=run_id, model_version=version)
    tracker.log_bytes(run_id, done.to_text().encode(), "fold.json")
    tracker.finish(run_id)
    return done.to_json()


def _params(drawn: DrawnTraining | DrawnTest) -> dict[str, Any]:
    places = ("fold", "folder", "store", "left_out")
    return {name: value for name, value in drawn.to_json().items() if name not in places}


def _metrics(result: FoldResult) -> dict[str, float]:
    def of(score: Score, prefix: str) -> dict[str, float]:
        return {f"{prefix}/miou": score.miou, f"{prefix}/fb_iou": score.fb_iou}

    # Under a name of its own, so that no table of runs compares it with an honest one.
    metrics = of(result.score, "test_epoch_chosen_on_test" if result.chosen_on_test else "test")
    for name in BASELINES:
        metrics |= of(result.baselines[name], f"baseline_{name}")
    metrics |= {f"class_iou/{name}": value for name, value in result.score.class_iou.items()}
    return metrics | {"best_epoch": result.best_epoch, "train_s": result.train_s, "evaluate_s": result.evaluate_s}


def _registered(
    config: CrossValidationConfig, data: str, tracker: Tracker, run_id: str, test: DrawnTest, result: FoldResult
) -> str:
    from mshnet.checkpoint import WEIGHTS_FILE, read_config

    # The episodes' hash is part of the protocol: only numbers on the same episodes are compared.
    protocol = f"{test.protocol}, episodes {test.episodes_hash}, {result.selection.split(' (')[0]}, data {data[:12]}"
    model = storage.join(config.store, result.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, WEIGHTS_FILE)
        weights.write_bytes(storage.read_bytes(storage.join(model, WEIGHTS_FILE)))
        version = tracker.register(
            config.model_name,
            run_id,
            weights,
            read_config(model),
            result.score.miou,
            protocol,
            result.fold,
            _description(config, result),
            data,
        )
    tracker.promote(config.model_name, version, protocol, result.score.miou, alias=f"fold{result.fold}")
    return version


def _description(config: CrossValidationConfig, result: FoldResult) -> str:
    return (
        f"MSHNet ({config.model.backbone}, {config.model.similarity}), {config.dataset} fold {result.fold}, "
        f"{config.shot}-shot: mIoU {100 * result.score.miou:.1f}, FB-IoU {100 * result.score.fb_iou:.1f} on "
        f"{', '.join(result.novel_classes)}. Protocol: {result.protocol}. Selection: {result.selection}. "
        f"Lists: {result.split_lists}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Register only: the job's stages up to the registry."""
    from pipelines.job import run_stages

    return run_stages(
        argv, "python -m pipelines.register", "Record and register the folds.", lambda graph: graph.registered
    )


if __name__ == "__main__":
    raise SystemExit(main())
