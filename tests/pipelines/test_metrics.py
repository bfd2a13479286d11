"""A fold's gauges where there is no Ray, and where Ray's metrics fail; with Ray: tests/infra/test_monitoring.py."""

from __future__ import annotations

import sys
import threading
import time
import types

import pytest

from mshnet.config import TrainingConfig
from pipelines.metrics import GAUGES, FoldMetrics, training_fold

pytestmark = pytest.mark.usefixtures("without_ray")
TRAINING = TrainingConfig(epochs=10, episodes_per_epoch=80, global_batch=8)


def threads() -> list[threading.Thread]:
    """That publish."""
    return [thread for thread in threading.enumerate() if thread.name == "fold metrics"]


def fake_ray(monkeypatch: pytest.MonkeyPatch, gauge: type) -> None:
    """Ray as far as gauges need it."""
    ray, metrics = types.ModuleType("ray"), types.ModuleType("ray.util.metrics")
    ray.is_initialized = lambda: True  # type: ignore[attr-defined]
    metrics.Gauge = gauge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util.metrics", metrics)


class Kept:
    """A gauge that keeps what it is set to."""

    values: dict[str, tuple[dict[str, str], float]] = {}  # noqa: RUF012

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys

    def set_default_tags(self, tags: dict[str, str]) -> Kept:
        assert set(tags) == set(self.tag_keys)
        self.tags = tags
        return self

    def set(self, value: float) -> None:
        Kept.values[self.name] = (self.tags, value)


class Broken(Kept):
    """A gauge that cannot be set."""

    def set(self, value: float) -> None:
        raise OSError("no agent here")


def wait(condition: object) -> None:
    """Until it is so."""
    until = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.01)


def test_without_ray_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with training_fold("coco", 0, "run"):
        metrics = FoldMetrics("coco", 0, "run")
        metrics.began(TRAINING, 3)
        assert threads() == []
        metrics.close()


def test_what_is_told_is_published_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray(monkeypatch, Kept)
    monkeypatch.setattr("pipelines.metrics.PUBLISH_S", 0.01)
    before = time.time()
    with training_fold("coco", 2, "abc"):
        metrics = FoldMetrics("coco", 2, "abc")
        metrics.began(TRAINING, 3)
        metrics.updated(4)
        metrics.set(loss=1.5, episodes_per_second=8.0, remaining_seconds=12.0, validation_miou=0.5)
        wait(lambda: Kept.values.keys() == GAUGES.keys())
    metrics.close()
    tags = {"dataset": "coco", "fold": "2", "run": "abc"}
    assert all(found == tags for found, _ in Kept.values.values())
    values = {name.removeprefix("mshnet_fold_"): value for name, (_, value) in Kept.values.items()}
    for name in ("started_time_seconds", "last_update_time_seconds"):
        assert before <= values.pop(name) <= time.time()
    assert values == {
        "updates": 4, "updates_planned": 100, "loss": 1.5, "episodes_per_second": 8.0, "remaining_seconds": 12.0,
        "validation_miou": 0.5,
    }  # fmt: skip
    wait(lambda: not threads())


def test_metrics_that_fail_are_said_once_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_ray(monkeypatch, Broken)
    metrics = FoldMetrics("coco", 2, "abc")
    metrics.began(TRAINING, 3)
    wait(lambda: not threads())
    metrics.updated(4)
    metrics.close()
    assert capsys.readouterr().err == "fold 2: no more metrics for Prometheus (no agent here)\n"


def test_an_update_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray(monkeypatch, Kept)
    metrics = FoldMetrics("coco", 2, "abc")
    began = time.perf_counter()
    for step in range(10_000):
        metrics.updated(step)
    metrics.close()
    assert (time.perf_counter() - began) / 10_000 < 1e-4  # an update takes a thousand times as long
