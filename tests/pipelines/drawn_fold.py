"""A small fold, drawn from generated pictures without Ray, and the training loop run in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mshnet.config import ImageFormat, ModelConfig, TrainingConfig
from mshnet.data.shapes import write_voc
from pipelines import draw, preprocess, scan, storage, train
from pipelines.checkpoints import Progress
from pipelines.config import ComputeConfig, CrossValidationConfig, ValidationConfig
from pipelines.dag import Stage
from pipelines.drawn import DrawnTraining

UPDATES = 4
"""Of the whole training: two epochs of two."""


def small_config(root: Path) -> CrossValidationConfig:
    """Two epochs of two updates at 33 px, a checkpoint after each; the store below the folder."""
    return CrossValidationConfig(
        source=str(root / "source"),
        store=str(root / "store"),
        images=ImageFormat(image_size_px=33),
        min_object_px=60,
        images_per_shard=80,
        backbone_weights="random",
        model=ModelConfig(backbone="resnet18"),
        training=TrainingConfig(epochs=2, episodes_per_epoch=8, global_batch=4, learning_rate=0.02),
        validation=ValidationConfig(held_out_classes=3, validation_episodes=6),
        compute=ComputeConfig(checkpoint_every_steps=1),
    )


def draw_fold(config: CrossValidationConfig, fold: int = 0) -> DrawnTraining:
    """What the fold trains on, everything before it made where it is missing."""
    if not Path(config.source).exists():
        write_voc(Path(config.source), images=120, size_px=48, seed=0)
    scanned = scan.scan_source(config)
    return DrawnTraining.from_json(done(draw.training_stage(config, scanned, preprocess.stages(config, scanned), fold)))


def done(stage: Stage) -> Mapping[str, Any]:
    """The stage's result; what is missing is run here, as Ray would run it elsewhere."""
    recorded = stage.recorded()
    if recorded is None:
        recorded = stage.run(*stage.arguments, *(done(need) for need in stage.needs))
        storage.write_json(stage.result, recorded)
    return recorded


def train_here(config: CrossValidationConfig, drawn: DrawnTraining, folder: Path) -> Progress:
    """The real loop to its end, by Ray Train's local mode: no cluster, one process."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.worker import train_loop

    job = train.job(config, drawn, str(folder), "")
    TorchTrainer(train_loop, train_loop_config=job, scaling_config=ScalingConfig(num_workers=0)).fit()
    return train.progress(config, drawn, str(folder))
