"""Watching a fold train: a bar in the terminal, live points in the tracker, gauges; none of them holds training up."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mshnet.config import TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.metrics import FoldMetrics
    from pipelines.results import EpochRecord
    from pipelines.tracking import Tracker

SMOOTHING_S = 120.0  # what lies further back hardly counts in the rate
WAITING_POINTS = 20  # for a slow tracker; the oldest go first
LAST_POINTS_S = 5.0  # how long the end of training waits for the tracker; what is missing of epochs, registering logs
TEXT_S = 2.0  # between two changes of the bar's text
GIB = 2**30


class Watch:
    """To be made by one worker of a fold, and told of each update and each epoch.

    In the terminal: loss (mean since the last look), episodes/s and the time that the fold still needs. In the
    run: the same as `live/...` at step = updates done, with what the machine does, every `every` updates; and the
    epochs' records. The tracker is spoken to by a thread of its own.
    """

    def __init__(
        self,
        tracker: Tracker | None,
        run_id: str,
        fold: int,
        training: TrainingConfig,
        every: int,
        first_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
        metrics: FoldMetrics | None = None,
    ) -> None:
        """`first_step`: updates done before, by whom this one resumes. `metrics` are closed with this."""
        self.fold, self.training, self.every = fold, training, every
        self.total = training.epochs * training.steps_per_epoch
        self._clock = clock
        self._pace = Pace(training.steps_per_epoch, clock())
        self._points = LivePoints(tracker, run_id, fold) if tracker else None
        self._metrics = metrics
        if metrics:
            metrics.began(training, first_step)
        self._usage = Usage(clock)
        self._losses: Tensor | None = None
        self._updates = 0  # since the last look
        self._loss_text, self._shown = "", clock()
        self._bar = _bar(self._text(min(first_step + 1, self.total), ""), self.total - first_step)

    def update(self, step: int, losses: Tensor, waited_s: float) -> None:
        """After each update. `step` updates are done; the losses (shape 3) are total, outer, inner.

        `waited_s`: seconds that training ever waited for the loader. The losses are looked at, which a GPU
        has to be waited for, every `every` updates only.
        """
        now = self._clock()
        self._pace.update(now, waited_s)
        self._losses = losses.detach().clone() if self._losses is None else self._losses + losses.detach()
        self._updates += 1
        if self._metrics:
            self._metrics.updated(step)
        if step % self.every == 0 or step == self.total:
            self._look(step)
        if now - self._shown >= TEXT_S or step == self.total:
            self._shown = now
            self._show(step)
        self._bar.update(1)

    def epoch(self, record: EpochRecord) -> None:
        """After each epoch: its record, for the run's curves."""
        if self._points:
            self._points.put_epoch(record)
        if self._metrics and record.validation_miou is not None:
            self._metrics.set(validation_miou=record.validation_miou)

    def pause(self) -> None:
        """Training stops for something else, such as validation; the next update ends it."""
        self._pace.pause()

    def close(self) -> None:
        """The end of the bar; waits some seconds for a tracker that has not got all."""
        self._bar.close()
        if self._metrics:
            self._metrics.close()
        if self._points:
            self._points.close()

    def _look(self, step: int) -> None:
        assert self._losses is not None
        total, outer, inner = (self._losses / self._updates).tolist()
        self._losses, self._updates, self._loss_text = None, 0, f" · loss {total:.4f}"
        rate = self._rate(step)
        if self._metrics:
            pace = {"episodes_per_second": rate["episodes_per_s"], "remaining_seconds": rate["eta_s"]} if rate else {}
            self._metrics.set(loss=total, **pace)
        if self._points:
            losses = {"loss": total, "outer_loss": outer, "inner_loss": inner}
            points = losses | {"loader_wait_percent": self._pace.waited()} | rate
            self._points.put(step, points | self._usage.of_the_process())

    def _rate(self, step: int) -> dict[str, float]:
        """Empty until there is one."""
        rate, left = self._pace.updates_per_s, self._pace.left_s(step, self.total)
        if rate is None or left is None:
            return {}
        return {"episodes_per_s": rate * self.training.global_batch, "eta_s": left}

    def _show(self, step: int) -> None:
        rate = self._rate(step)
        pace = f" · {rate['episodes_per_s']:.1f} episodes/s · {hours(rate['eta_s'])} left" if rate else ""
        self._bar.set_description(self._text(step, self._loss_text + pace))

    def _text(self, step: int, rest: str) -> str:
        epoch = max(0, step - 1) // self.training.steps_per_epoch + 1
        return f"fold {self.fold}: epoch {epoch}/{self.training.epochs}{rest}"


class Pace:
    """How fast updates follow each other, lately; pauses left out of the rate and put into what is left."""

    def __init__(self, steps_per_epoch: int, now: float) -> None:
        self.steps_per_epoch = steps_per_epoch
        self._last: float | None = None  # end of the last update; none before the first, which has all the starting
        self._paused = False
        self._updates = self._seconds = 0.0  # of the past, that counts less and less
        self._pauses = 0
        self._pauses_s = 0.0
        self._waited: float | None = None
        self._waited_s = self._trained_s = 0.0  # since `waited` was asked for

    def update(self, now: float, waited_s: float) -> None:
        """An update ends."""
        if self._last is not None and not self._paused:
            elapsed = now - self._last
            keep = math.exp(-elapsed / SMOOTHING_S)
            self._updates, self._seconds = keep * self._updates + 1, keep * self._seconds + elapsed
            self._trained_s += elapsed
            self._waited_s += waited_s - (self._waited or 0.0)
        elif self._last is not None:
            self._pauses += 1
            self._pauses_s += max(0.0, now - self._last - 1 / (self.updates_per_s or math.inf))
        self._last, self._waited, self._paused = now, waited_s, False

    def pause(self) -> None:
        """Until the next update ends."""
        self._paused = True

    @property
    def updates_per_s(self) -> float | None:
        """None until two updates have followed each other."""
        return self._updates / self._seconds if self._seconds > 0 else None

    def left_s(self, step: int, total: int) -> float | None:
        """Until all `total` updates are done, the pauses at the ends of epochs included once one was seen."""
        if self.updates_per_s is None:
            return None
        epochs = math.ceil(total / self.steps_per_epoch) - (step - 1) // self.steps_per_epoch
        pause = self._pauses_s / self._pauses if self._pauses else 0.0
        return (total - step) / self.updates_per_s + pause * epochs

    def waited(self) -> float:
        """Percent of the training time that went into waiting for the loader, since this was asked for last."""
        percent = 100 * self._waited_s / self._trained_s if self._trained_s > 0 else 0.0
        self._waited_s = self._trained_s = 0.0
        return percent


class Usage:
    """What this process takes of its machine."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._then, self._cpu_s = clock(), _cpu_s()

    def of_the_process(self) -> dict[str, float]:
        """Cores in use since this was asked for last (100: one core), and memory. Loader processes not included."""
        now, cpu_s = self._clock(), _cpu_s()
        values = {"cpu_percent": 100 * (cpu_s - self._cpu_s) / (now - self._then)} if now > self._then else {}
        self._then, self._cpu_s = now, cpu_s
        pages = Path("/proc/self/statm")
        if pages.exists():  # Linux
            values["resident_gib"] = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
        return values


class LivePoints:
    """Sends points and epochs to the tracker from a thread; epochs first.

    A tracker that is slow loses the oldest points but no epoch; one that is away all that it is sent meanwhile.
    """

    def __init__(self, tracker: Tracker, run_id: str, fold: int) -> None:
        self._tracker, self._run_id, self._fold = tracker, run_id, fold
        self._epochs: deque[EpochRecord] = deque()
        self._waiting: deque[tuple[int, Mapping[str, float], int | None]] = deque(maxlen=WAITING_POINTS)
        self._something, self._closing, self._away = threading.Event(), threading.Event(), False
        self._gpu = GpuUsage(fold)
        self._thread = threading.Thread(target=self._send_all, name="live points", daemon=True)
        self._thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """A point; the same as never if the tracker does not keep up."""
        self._waiting.append((step, values, _device()))
        self._something.set()

    def put_epoch(self, record: EpochRecord) -> None:
        """An epoch's record, sent before all points that wait."""
        self._epochs.append(record)
        self._something.set()

    def close(self) -> None:
        """Send what waits, for some seconds at most."""
        self._closing.set()
        self._something.set()
        self._thread.join(LAST_POINTS_S)
        if self._thread.is_alive() and not self._away:
            self._say("has not taken all live points and epochs; going on without")

    def _send_all(self) -> None:
        while not (self._closing.is_set() and not self._epochs and not self._waiting):
            self._something.wait()
            self._something.clear()
            while self._epochs or self._waiting:
                self._send_next()

    def _send_next(self) -> None:
        try:
            if self._epochs:
                self._tracker.log_epoch(self._run_id, self._epochs.popleft())
            else:
                self._send(*self._waiting.popleft())
            self._away = False
        except Exception as error:  # noqa: BLE001 - whatever ails the tracker, training goes on
            if not self._away:
                self._say(f"takes no live points or epochs ({error}); training goes on")
            self._away = True

    def _send(self, step: int, values: Mapping[str, float], device: int | None) -> None:
        gpu = {} if device is None else self._gpu.of(device)
        finite = {f"live/{name}": value for name, value in {**values, **gpu}.items() if math.isfinite(value)}
        self._tracker.log_metrics(self._run_id, finite, step)

    def _say(self, text: str) -> None:
        print(f"fold {self._fold}: the tracker {text}", file=sys.stderr, flush=True)


class GpuUsage:
    """What this process takes of a GPU, and how busy the GPU is, where NVML can say so."""

    def __init__(self, fold: int) -> None:
        self._fold, self._nvml = fold, True

    def of(self, device: int) -> dict[str, float]:
        """Memory in GiB, utilisation in percent (of all processes); without the latter, says once why."""
        import torch

        values = {
            "gpu_memory_gib": torch.cuda.memory_reserved(device) / GIB,
            "gpu_memory_peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        }
        if self._nvml:
            try:
                values["gpu_utilisation_percent"] = float(torch.cuda.utilization(device))
            except Exception as error:  # noqa: BLE001 - no package, no driver for it, or an NVML without an answer
                self._nvml = False
                message = f"fold {self._fold}: no utilisation of the GPU in the live points ({error})"
                print(message, file=sys.stderr, flush=True)
        return values


def hours(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _bar(text: str, total: int) -> Any:
    """Over the updates that are left, so that the bar's own estimate is right after a resume too."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        from ray.experimental import tqdm_ray

        return tqdm_ray.tqdm(total=total, desc=text, unit="update", flush_interval_s=2)
    import tqdm

    return tqdm.tqdm(total=total, desc=text, unit="update", dynamic_ncols=True, file=sys.stderr)


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def _device() -> int | None:
    """The GPU that this thread computes on."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else None
