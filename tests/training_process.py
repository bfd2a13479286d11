"""Trains a small fold in a process of its own, to be killed.

python -m tests.training_process ROOT FOLDER [WORKERS [MIN_WORKERS [EPOCHS]]]
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from mshnet.config import ImageFormat
from pipelines import train
from pipelines.checkpoints import Progress
from pipelines.cluster import connected
from pipelines.config import CrossValidationConfig
from pipelines.drawn import DrawnTraining
from tests.pipelines.drawn_fold import draw_fold, small_config

EPOCHS, UPDATES_EACH = 2, 6
UPDATES = EPOCHS * UPDATES_EACH


def small_fold(
    root: Path, workers: int = 1, min_workers: int = 0, epochs: int = EPOCHS
) -> tuple[CrossValidationConfig, DrawnTraining]:
    """65 px: with fewer, batch norm has so few values that rounding decides where training goes."""
    config = small_config(root)
    config = replace(
        config,
        images=ImageFormat(image_size_px=65),
        training=replace(config.training, epochs=epochs, episodes_per_epoch=4 * UPDATES_EACH, learning_rate=0.001),
        compute=replace(
            config.compute,
            workers=workers,
            min_workers=min_workers,
            elastic_check_s=2.0,
            max_failures=1000,
            checkpoint_every_steps=2,
        ),
    )
    return config, draw_fold(config)


def losses(progress: Progress) -> list[tuple[int, float, float, float, float | None]]:
    """Of a history what is no time."""
    return [(r.step, r.loss, r.outer_loss, r.inner_loss, r.validation_miou) for r in progress.history]


def main(root: str, folder: str, workers: str = "1", min_workers: str = "0", epochs: str = str(EPOCHS)) -> None:
    """Prints the losses as JSON when it comes to its end."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # how soon a death is noticed
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"  # and a node that is gone
    config, drawn = small_fold(Path(root), int(workers), int(min_workers), int(epochs))
    with connected():
        import ray

        print(f"driver's node: {ray.get_runtime_context().get_node_id()}", file=sys.stderr, flush=True)
        print(json.dumps(losses(train.fit(config, drawn, folder, ""))))


if __name__ == "__main__":
    main(*sys.argv[1:])
