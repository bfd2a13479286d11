"""Training one fold with Ray Train, as a stage.

python -m pipelines.train --dataset pascal --source data/VOC2012 --folds 0
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import provenance, storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.draw import DrawnTraining
from pipelines.results import EpochRecord, Record

CODE_VERSION = 2
"""Raise it when the same episodes would give other weights."""
MODEL, RUN = "model", "run"
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
        cpus=0,  # waits for its workers, which hold the cores
        parts=(storage.join(MODEL, WEIGHTS_FILE), storage.join(MODEL, CONFIG_FILE)),
        # Optimizer states of a finished fold are of no more use, and twice the model's size.
        scratch=storage.join(folder, RUN),
    )


def key(config: CrossValidationConfig, inputs: Mapping[str, str], drawn: Stage) -> str:
    """Fingerprint of a fold's weights.

    GPU workers share their batch statistics, so their number changes rounding only; CPU workers do not.
    """
    plain = config.to_json()
    groups = 1 if config.compute.use_gpu else config.compute.workers
    settings = (plain["model"], plain["training"], config.precision, groups)
    return fingerprint("train", CODE_VERSION, drawn.key, inputs["backbone_weights"], *settings)


def train_fold(
    config: CrossValidationConfig,
    inputs: Mapping[str, str],
    folder: str,
    run_id: str,
    drawn_result: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Run Ray Train, going on from the last checkpoint where there is one, and keep the chosen weights."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.worker import train_loop

    drawn = DrawnTraining.from_json(drawn_result)
    compute = config.compute
    path, filesystem = storage.for_arrow(folder)
    resources: dict[str, float] = {"CPU": compute.cpus_per_worker}
    if compute.use_gpu:
        resources["GPU"] = 1
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config.to_json(), "drawn": drawn.to_json(), "run_id": run_id},
        torch_config=TorchConfig(backend="nccl" if compute.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=compute.workers, use_gpu=compute.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # The same name finds the checkpoints of an interrupted run.
            name=RUN,
            logging_config=LoggingConfig(log_level="WARNING"),
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
        ),
    )
    result = trainer.fit()
    return _keep(config, inputs, folder, run_id, drawn, result).to_json()


def _keep(
    config: CrossValidationConfig,
    inputs: Mapping[str, str],
    folder: str,
    run_id: str,
    drawn: DrawnTraining,
    result: Any,
) -> TrainedFold:
    import torch

    from mshnet.checkpoint import save_model
    from pipelines.network import build_network
    from pipelines.worker import PROGRESS_FILE, STATE_FILE, Progress

    best, _ = max(result.best_checkpoints, key=lambda pair: pair[1]["score"])
    with result.checkpoint.as_directory() as last:
        progress = Progress.from_json(json.loads(Path(last, PROGRESS_FILE).read_text()))
    with best.as_directory() as chosen:
        best_epoch = len(Progress.from_json(json.loads(Path(chosen, PROGRESS_FILE).read_text())).history)
        state = torch.load(Path(chosen, STATE_FILE), map_location="cpu", weights_only=True)
    model = build_network(config)
    model.relation.load_state_dict(state["relation"])
    model.backbone.load_state_dict(state["backbone_buffers"], strict=False)
    model_folder = storage.join(folder, MODEL)
    save_model(
        model,
        model_folder,
        {
            "image_size_px": config.images.image_size_px,
            "shot": config.shot,
            "fold": drawn.fold,
            "best_epoch": best_epoch,
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
        history=progress.history,
        best_epoch=best_epoch,
        train_episodes=progress.step * config.training.global_batch,
        train_s=progress.train_s,
        run_id=run_id,
        git_commit=provenance.git_commit(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train only: the job's stages up to the folds' weights."""
    from pipelines.job import run_stages

    return run_stages(argv, "python -m pipelines.train", "Train the folds.", lambda graph: graph.trained)


if __name__ == "__main__":
    raise SystemExit(main())
