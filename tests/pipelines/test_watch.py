"""Live progress: the numbers of known rates, and a training that no tracker can hold up."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from mshnet.config import TrainingConfig
from pipelines.results import EpochRecord
from pipelines.watch import WAITING_POINTS, GpuUsage, LivePoints, Pace, Watch, hours

pytestmark = pytest.mark.usefixtures("without_ray")
TRAINING = TrainingConfig(epochs=10, episodes_per_epoch=80, global_batch=8)  # 10 updates an epoch, 100 in all
LOSSES = torch.tensor([3.0, 2.0, 1.0])


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Points:
    """A tracker that keeps what it is given, when it is let."""

    def __init__(self, let: bool = True) -> None:
        self.steps: list[int] = []
        self.values: list[Mapping[str, float]] = []
        self.epochs: list[int] = []
        self.asked, self.let = threading.Event(), threading.Event()
        self.errors: Iterator[str | None] = iter(())
        if let:
            self.let.set()

    def log_metrics(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        self.answer()
        self.steps.append(step)
        self.values.append(values)

    def log_epoch(self, run_id: str, record: EpochRecord) -> None:
        self.answer()
        self.epochs.append(record.epoch)

    def answer(self) -> None:
        self.asked.set()
        self.let.wait(60)
        if error := next(self.errors, None):
            raise ConnectionError(error)


def epoch(number: int) -> EpochRecord:
    return EpochRecord(
        epoch=number,
        step=10 * number,
        loss=1.3,
        outer_loss=1.0,
        inner_loss=1.0,
        learning_rate=0.1,
        episodes_per_s=4.0,
        validation_miou=None,
    )


def watch(tracker: Any, clock: Clock, every: int = 5, first_step: int = 0) -> Watch:
    return Watch(tracker, "run", 2, TRAINING, every, first_step, clock)


def run(watched: Watch, clock: Clock, steps: range, update_s: float = 2.0, wait_s: float = 0.5) -> None:
    for i, step in enumerate(steps):
        clock.now += update_s
        watched.update(step, LOSSES + step % 2, wait_s * (i + 1))


def test_the_numbers_of_a_known_rate(capsys: pytest.CaptureFixture[str]) -> None:
    clock, tracker = Clock(), Points()
    watched = watch(tracker, clock)
    clock.now += 300  # a compiler; the first update's time does not count
    run(watched, clock, range(1, 21))
    watched.close()
    assert tracker.steps == [5, 10, 15, 20]
    last = tracker.values[-1]
    assert last["live/episodes_per_s"] == pytest.approx(4.0)
    assert last["live/eta_s"] == pytest.approx(160.0)
    assert last["live/loader_wait_percent"] == pytest.approx(25.0)
    # The mean of the last five updates: those of 16, 18 and 20 have 3, 17 and 19 have 4.
    assert [last[f"live/{name}"] for name in ("loss", "outer_loss", "inner_loss")] == pytest.approx([3.4, 2.4, 1.4])
    assert last["live/resident_gib"] > 0.05
    assert last["live/cpu_percent"] >= 0
    assert "fold 2: epoch 2/10 · loss 3.4000 · 4.0 episodes/s · 0:02:40 left" in capsys.readouterr().err


def test_what_is_left_is_right_at_once_after_a_resume(capsys: pytest.CaptureFixture[str]) -> None:
    clock, tracker = Clock(), Points()
    watched = watch(tracker, clock, every=2, first_step=60)
    run(watched, clock, range(61, 63))
    watched.close()
    assert tracker.steps == [62]
    assert tracker.values[0]["live/eta_s"] == pytest.approx(2.0 * 38)
    assert "| 2/40 [" in capsys.readouterr().err  # the bar's own estimate starts anew too


def test_a_pause_slows_no_rate_and_is_awaited_at_every_epochs_end() -> None:
    clock, tracker = Clock(), Points()
    watched = watch(tracker, clock, every=10)
    run(watched, clock, range(1, 11))
    watched.pause()
    clock.now += 30
    run(watched, clock, range(11, 21))
    watched.close()
    assert [point["live/episodes_per_s"] for point in tracker.values] == pytest.approx([4.0, 4.0])
    assert tracker.values[0]["live/eta_s"] == pytest.approx(2.0 * 90)
    # 80 updates of 2 s, and the pauses after epochs 2 (not yet made) to 10.
    assert tracker.values[1]["live/eta_s"] == pytest.approx(2.0 * 80 + 9 * 30)


def test_the_rate_follows_a_change() -> None:
    pace, now = Pace(10, 0.0), 0.0
    for seconds in [1.0] * 500 + [3.0] * 200:
        now += seconds
        pace.update(now, 0.0)
    assert pace.updates_per_s == pytest.approx(1 / 3, rel=0.02)
    assert pace.left_s(700, 1000) == pytest.approx(900, rel=0.02)


def test_a_tracker_that_hangs_holds_nothing_up_and_the_newest_points_win() -> None:
    clock, tracker = Clock(), Points(let=False)
    watched = watch(tracker, clock, every=1)
    run(watched, clock, range(1, 2))
    assert tracker.asked.wait(30)
    done = threading.Thread(target=run, args=(watched, clock, range(2, 101)))
    done.start()
    done.join(30)
    assert not done.is_alive()
    tracker.let.set()
    watched.close()
    assert tracker.steps == [1, *range(101 - WAITING_POINTS, 101)]


def test_no_epoch_is_dropped_and_none_waits_behind_points() -> None:
    clock, tracker = Clock(), Points(let=False)
    watched = watch(tracker, clock, every=1)
    run(watched, clock, range(1, 2))
    assert tracker.asked.wait(30)
    for number in range(1, 2 * WAITING_POINTS):
        watched.epoch(epoch(number))
        run(watched, clock, range(number + 1, number + 2))
    assert tracker.epochs == []  # and here we are
    sent: list[object] = []
    tracker.epochs = tracker.steps = sent  # type: ignore[assignment]
    tracker.let.set()
    watched.close()
    last = 2 * WAITING_POINTS
    assert sent == [1, *range(1, last), *range(last + 1 - WAITING_POINTS, last + 1)]


def test_closing_leaves_a_tracker_that_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.watch.LAST_POINTS_S", 0.05)
    tracker: Any = Points(let=False)
    points = LivePoints(tracker, "run", 0)
    points.put_epoch(epoch(1))
    closing = threading.Thread(target=points.close)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    assert "fold 0: the tracker has not taken all live points and epochs" in capsys.readouterr().err
    tracker.let.set()


def test_an_outage_is_said_once_and_training_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    tracker: Any = Points()
    tracker.errors = iter(["down", "down", "down", None, "down again"])
    points = LivePoints(tracker, "run", 3)
    points.put_epoch(epoch(1))
    for step in range(1, 6):
        points.put(step, {"loss": 1.0, "eta_s": float("inf")})
    points.close()
    assert tracker.epochs == []
    assert tracker.steps == [3, 5]
    assert tracker.values[0] == {"live/loss": 1.0}  # what is not finite, no server takes
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"fold 3: the tracker takes no live points or epochs ({error}); training goes on"
        for error in ("down", "down again")
    ]


def test_a_gpu_whose_utilisation_cannot_be_had_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**29)
    memory = {"gpu_memory_gib": 3.0, "gpu_memory_peak_gib": 0.5}
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 70 + device)
    assert GpuUsage(2).of(1) == memory | {"gpu_utilisation_percent": 71.0}

    def absent(device: int) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", absent)
    usage = GpuUsage(2)
    assert usage.of(0) == usage.of(0) == memory
    assert capsys.readouterr().err.count("fold 2: no utilisation of the GPU in the live points (nvidia-ml-py") == 1


def test_without_a_tracker_there_is_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    watched = watch(None, clock)
    watched.epoch(epoch(1))
    run(watched, clock, range(1, 101))
    watched.close()
    assert "100/100" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (3599.6, "1:00:00"), (360_061, "100:01:01")])
def test_hours(seconds: float, text: str) -> None:
    assert hours(seconds) == text


def test_an_update_between_two_looks_reads_nothing_off_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    watched = watch(None, clock, every=50)
    run(watched, clock, range(1, 3))
    read = []
    for name in ("tolist", "item", "__float__", "__bool__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: read.append(name))
    run(watched, clock, range(3, 49))
    assert read == []
    with pytest.raises(TypeError):  # at the fiftieth it does
        run(watched, clock, range(49, 51))
    assert read == ["tolist"]
    monkeypatch.undo()
    watched.close()
