"""Training one fold with Ray Train, as a stage.

python -m pipelines.train --dataset pascal --source data/VOC2012 --folds 0
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import dag, provenance, storage
from pipelines.checkpoints import CHECKPOINTS, RUN, Checkpoints, Progress, fold_key
from pipelines.config import ComputeConfig, CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.drawn import DrawnTraining
from pipelines.metrics import training_fold
from pipelines.results import EpochRecord, Record

CODE_VERSION = 3
"""Raise it when the same episodes would give other weights."""
MODEL = "model"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"  # of mshnet.checkpoint, which loads torch


@dataclass(frozen=True, kw_only=True)
class TrainedFold(Record):
    """A fold's chosen weights."""

    fold: int
    model: str
    """Folder of the model, below the store's root."""
    history: list[EpochRecord]
    best_epoch: int
    train_episodes: int
    train_s: float
    run_id: str
    """MLflow run that the training was logged in; a job that reuses the weights has runs of its own."""
    git_commit: str
    """Of the code that trained."""


def stage(
    config: CrossValidationConfig,
    inputs: Mapping[str, str],
    drawn: Stage,
    fold: int,
    run_id: str,
    after: tuple[Stage, ...],
) -> Stage:
    """Train a fold; `inputs` are the fingerprints of the data and of the backbone's weights."""
    folder = storage.join(config.store, "folds", f"{config.dataset}-fold{fold}-{key(config, inputs, drawn)}")
    return Stage(
        name=f"train fold {fold}",
        result=storage.join(folder, "result.json"),
        run=train_fold,
        arguments=(config, inputs, folder, run_id),
        needs=(drawn,),
        after=after,
        alone=True,
        cpus=0,  # waits for its workers, which hold the cores
        parts=(storage.join(MODEL, WEIGHTS_FILE), storage.join(MODEL, CONFIG_FILE)),
        # Optimizer states of a finished fold are of no more use, and twice the model's size.
        scratch=storage.join(folder, RUN),
    )


def key(config: CrossValidationConfig, inputs: Mapping[str, str], drawn: Stage) -> str:
    """Fingerprint of a fold's weights. The number of workers changes rounding only."""
    settings = (config.model.identity(), config.to_json()["training"], config.precision)
    return fingerprint("train", CODE_VERSION, drawn.key, inputs["backbone_weights"], *settings)


def train_fold(
    config: CrossValidationConfig,
    inputs: Mapping[str, str],
    folder: str,
    run_id: str,
    drawn_result: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Train, going on from the last checkpoint where there is one, and keep the chosen weights."""
    drawn = DrawnTraining.from_json(drawn_result)
    reached = fit(config, drawn, folder, run_id)
    return _keep(config, inputs, folder, run_id, drawn, reached).to_json()


def fit(
    config: CrossValidationConfig,
    drawn: DrawnTraining,
    folder: str,
    run_id: str,
    callbacks: Sequence[Any] = (),
) -> Progress:
    """Train a fold to its end with Ray Train, from its newest checkpoint below the folder on; gives the end.

    `run_id` is of the MLflow run that is told of it; empty: none.

    Raises InputError, TrainingDivergedError and TakenOverError at once and as themselves; what else ends a worker is
    tried again, up to `max_failures` times without getting any further. `callbacks` are Ray Train's.
    """
    with training_fold(config.dataset, drawn.fold, run_id):
        return _fit(config, drawn, folder, run_id, callbacks)


def _fit(
    config: CrossValidationConfig, drawn: DrawnTraining, folder: str, run_id: str, callbacks: Sequence[Any]
) -> Progress:
    updates = config.training.epochs * config.training.steps_per_epoch
    reached, unfinished = progress(config, drawn, folder), False
    while True:
        before, error = reached.step, _run(config, drawn, folder, run_id, callbacks)
        reached = progress(config, drawn, folder)
        if reached.step == updates:
            return reached
        if error is not None and reached.step <= before:
            raise error
        if error is None and unfinished:
            raise RuntimeError(
                f"expected the training below {folder!r} to end with a sound checkpoint of update {updates}, found "
                f"twice that the newest is of {reached.step}; look at what the store does with files"
            )
        unfinished |= error is None
        print(f"fold {drawn.fold}: stopped at update {reached.step}/{updates}; going on", file=sys.stderr, flush=True)


def _run(
    config: CrossValidationConfig, drawn: DrawnTraining, folder: str, run_id: str, callbacks: Sequence[Any]
) -> Exception | None:
    """Workers until all end well; or what ended them, once they have failed more than `max_failures` times."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from pipelines.failures import NOT_AGAIN, EndAtOnce
    from pipelines.rendezvous import OneAddressTorchConfig
    from pipelines.worker import train_loop

    compute = config.compute
    path, filesystem = storage.for_arrow(storage.join(folder, RUN))
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=job(config, drawn, folder, run_id),
        torch_config=OneAddressTorchConfig(backend="nccl" if compute.use_gpu else "gloo"),
        scaling_config=_scaling(compute),
        run_config=RunConfig(
            # A new name each time: Ray Train finds nothing of a run before, and needs nothing of it.
            name=f"ray-{uuid.uuid4().hex}",
            logging_config=LoggingConfig(log_level="WARNING"),
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=compute.max_failures),
            callbacks=[*callbacks, EndAtOnce()],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        cause = dag.cause(error)
        if isinstance(cause, NOT_AGAIN):
            raise cause from None
        failure: Exception = error
        return failure
    return None


def job(config: CrossValidationConfig, drawn: DrawnTraining, folder: str, run_id: str) -> dict[str, Any]:
    """What `worker.train_loop` takes, as JSON values."""
    return {"config": config.to_json(), "drawn": drawn.to_json(), "folder": folder, "run_id": run_id}


def progress(config: CrossValidationConfig, drawn: DrawnTraining, folder: str) -> Progress:
    """Where a fold's training stands, by its newest sound checkpoint."""
    newest = _checkpoints(config, drawn, folder).newest()
    return newest[1].progress if newest else Progress()


def _checkpoints(config: CrossValidationConfig, drawn: DrawnTraining, folder: str) -> Checkpoints:
    return Checkpoints(storage.join(folder, CHECKPOINTS), fold_key(config, drawn))


def _scaling(compute: ComputeConfig) -> Any:
    from ray.train import ScalingConfig

    resources: dict[str, float] = {"CPU": compute.cpus_per_worker}
    if compute.use_gpu:
        resources["GPU"] = 1
    return ScalingConfig(
        num_workers=(compute.min_workers, compute.workers) if compute.min_workers else compute.workers,
        use_gpu=compute.use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=compute.elastic_check_s,
    )


def _keep(
    config: CrossValidationConfig,
    inputs: Mapping[str, str],
    folder: str,
    run_id: str,
    drawn: DrawnTraining,
    reached: Progress,
) -> TrainedFold:
    from mshnet.checkpoint import save_model
    from pipelines.checkpoint_writer import load_state
    from pipelines.network import build_network

    best, chosen = _checkpoints(config, drawn, folder).best(reached)
    model = build_network(config)
    load_state(chosen.tensors, model.relation, None, model.backbone)
    model_folder = storage.join(folder, MODEL)
    save_model(
        model,
        model_folder,
        {
            "image_size_px": config.images.image_size_px,
            "shot": config.shot,
            "fold": drawn.fold,
            "best_epoch": best.epoch,
            "selection": drawn.selection,
            "fingerprints": dict(inputs),
            "git_commit": provenance.git_commit(),
            "versions": provenance.versions(),
            "config": config.to_json(),
        },
    )
    return TrainedFold(
        fold=drawn.fold,
        model=storage.below(config.store, model_folder),
        history=reached.history,
        best_epoch=best.epoch,
        train_episodes=reached.step * config.training.global_batch,
        train_s=reached.train_s,
        run_id=run_id,
        git_commit=provenance.git_commit(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train only: the job's stages up to the folds' weights."""
    from pipelines.job import run_stages

    return run_stages(argv, "python -m pipelines.train", "Train the folds.", lambda graph: graph.trained)


if __name__ == "__main__":
    raise SystemExit(main())
