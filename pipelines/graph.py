"""The cross-validation as a graph of stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines import aggregate, draw, evaluate, given, preprocess, provenance, register, survey, train
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.scan import Scan


@dataclass(frozen=True)
class Runs:
    """The job's MLflow runs. Empty in a dry run."""

    parent: str = ""
    folds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Every stage of a cross-validation, by kind, folds in the configuration's order."""

    sealed: Stage
    drawn_training: tuple[Stage, ...]
    drawn_test: tuple[Stage, ...]
    trained: tuple[Stage, ...]
    evaluated: tuple[Stage, ...]
    registered: tuple[Stage, ...]
    reported: Stage
    surveyed: Stage | None = None
    """Of one's own data: the data report, before anything is trained. Nothing needs it."""


def build(
    config: CrossValidationConfig, scanned: Scan, weights: str, runs: Runs = Runs(), side_by_side: int = 1
) -> Graph:
    """The graph; `weights` identifies the backbone's, `side_by_side` is how many folds train at once."""
    run_ids = runs.folds or ("",) * len(config.folds)
    inputs: Mapping[str, str] = provenance.fingerprints(scanned, weights)
    sealed = preprocess.stages(config, scanned)
    training = tuple(draw.training_stage(config, scanned, sealed, fold) for fold in config.folds)
    test = tuple(draw.test_stage(config, scanned, sealed, fold) for fold in config.folds)
    drawn = tuple(zip(training, test, strict=True))
    surveyed = survey.stage(config, scanned, sealed, runs.parent) if config.is_own else None
    ahead = (surveyed,) if surveyed else ()  # what to expect is said before the hours begin
    trained: list[Stage] = []
    for fold, fold_drawn, run_id in zip(config.folds, training, run_ids, strict=True):
        if config.trained:
            trained.append(given.stage(config, fold))
            continue
        # Without room for all at once, a fold waits for the one that has its place.
        earlier = (trained[-side_by_side],) if len(trained) >= side_by_side else ()
        trained.append(train.stage(config, inputs, fold_drawn, fold, run_id, (*earlier, *ahead)))
    evaluated = tuple(
        evaluate.stage(config, d, t, fold) for fold, d, t in zip(config.folds, drawn, trained, strict=True)
    )
    job = job_key(config, evaluated)
    registered = tuple(
        register.stage(config, scanned.fingerprint, d, t, e, fold, run_id, job)
        for fold, d, t, e, run_id in zip(config.folds, drawn, trained, evaluated, run_ids, strict=True)
    )
    reported = aggregate.stage(config, scanned, weights, evaluated, registered, runs.parent, job)
    return Graph(sealed, training, test, tuple(trained), evaluated, registered, reported, surveyed)


def job_key(config: CrossValidationConfig, evaluated: tuple[Stage, ...]) -> str:
    """What makes two submissions the same job: the same numbers for the same registered model."""
    return fingerprint([stage.key for stage in evaluated], config.model_name)
