"""How far each fold is, among Ray's own metrics: for Prometheus, which alerts where a fold stands still.

Ray forgets a gauge some 20 s after it was last set. So a thread sets them again and again, what training does costs the
assignment of numbers, and a fold that has ended is gone by itself.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from mshnet.config import TrainingConfig

PUBLISH_S = 5.0
"""Twice as often as Ray collects."""
TAGS = ("dataset", "fold", "run")
"""`run` is the MLflow run, which tells jobs apart."""
STARTED = "mshnet_fold_started_time_seconds"
GAUGES = {
    STARTED: "When the fold's training began, or was taken up again, unix time; gone when it has ended",
    "mshnet_fold_last_update_time_seconds": "When the last update ended, or the workers began, unix time",
    "mshnet_fold_updates": "Updates done, those before a restart included",
    "mshnet_fold_updates_planned": "Updates of the whole training",
    "mshnet_fold_episodes_per_second": "Training episodes per second, lately, without pauses for validation",
    "mshnet_fold_remaining_seconds": "Time that the training still needs, by its pace lately",
    "mshnet_fold_loss": "Mean loss of the last updates",
    "mshnet_fold_validation_miou": "mIoU of the last validation, 0 to 1",
}


class FoldMetrics:
    """The gauges of one fold, as this process knows them. Without Ray, nothing happens; nothing ever fails."""

    def __init__(self, dataset: str, fold: int, run_id: str) -> None:
        self._tags = {"dataset": dataset, "fold": str(fold), "run": run_id}
        self._values: dict[str, float] = {}
        self._end = threading.Event()
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            threading.Thread(target=self._publish, name="fold metrics", daemon=True).start()

    def began(self, training: TrainingConfig, step: int) -> None:
        """The workers are there, `step` updates are done."""
        self._values["mshnet_fold_updates_planned"] = training.epochs * training.steps_per_epoch
        self.updated(step)

    def updated(self, step: int) -> None:
        """After each update: so many are done."""
        self._values["mshnet_fold_updates"] = step
        self._values["mshnet_fold_last_update_time_seconds"] = time.time()

    def set(self, **values: float) -> None:
        """Gauges by the rest of their names, behind `mshnet_fold_`."""
        for name, value in values.items():
            self._values[f"mshnet_fold_{name}"] = value

    def close(self) -> None:
        """No more of them."""
        self._end.set()

    def _publish(self) -> None:
        gauges: dict[str, Any] = {}
        try:
            from ray.util.metrics import Gauge

            while not self._end.is_set():
                for name, value in dict(self._values).items():
                    if name not in gauges:
                        gauges[name] = Gauge(name, GAUGES[name], TAGS).set_default_tags(self._tags)
                    gauges[name].set(value)
                self._end.wait(PUBLISH_S)
        except Exception as error:  # noqa: BLE001 - whatever ails the metrics, training goes on
            fold = self._tags["fold"]
            print(f"fold {fold}: no more metrics for Prometheus ({error})", file=sys.stderr, flush=True)


@contextlib.contextmanager
def training_fold(dataset: str, fold: int, run_id: str) -> Iterator[None]:
    """Says, while the block runs, that the fold is being trained: by a process that outlives its workers."""
    metrics = FoldMetrics(dataset, fold, run_id)
    metrics.set(started_time_seconds=time.time())
    with contextlib.closing(metrics):
        yield
