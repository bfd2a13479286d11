"""Training killed at random updates and gone on with: by Ray itself, by submitting again, with fewer workers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import torch

from pipelines import train
from pipelines.checkpoints import CHECKPOINTS, Checkpoint
from tests import tolerances
from tests.e2e.conftest import REPOSITORY, start
from tests.training_process import UPDATES, losses, small_fold

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
DEADLINE_S = 300.0
LAST_KILL = UPDATES // 2
"""So that there is something left to do, however quick the machine is."""
ROUNDS = 3
"""Tries to kill a training before it ends by itself."""
Result = TypeVar("Result")


class EndedBeforeTheKillError(Exception):
    """The training was quicker than the kill: the round shows nothing."""


def redone(a_round: Callable[[Path], Result], folder: Path) -> Result:
    """What a round gave in which the kill fell into the training; each has a folder of its own."""
    for i in range(ROUNDS - 1):
        with suppress(EndedBeforeTheKillError):
            return a_round(folder.with_name(f"{folder.name}-{i}"))
    return a_round(folder.with_name(f"{folder.name}-{ROUNDS - 1}"))


class Chance:
    """Where a kill falls; its seed is shown when the test fails."""

    def __init__(self) -> None:
        self.seed = int(os.environ.get("MSHNET_KILL_SEED", int.from_bytes(os.urandom(4), "little")))
        self._drawn = random.Random(self.seed)
        print(f"kill points: MSHNET_KILL_SEED={self.seed}")

    def update(self) -> int:
        """After how many updates."""
        return self._drawn.randint(1, LAST_KILL)

    def moment_s(self) -> float:
        """Within about an update."""
        return self._drawn.uniform(0, 0.5)


@pytest.fixture
def chance() -> Chance:
    return Chance()


@contextmanager
def training(folder: Path, workers: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A driver, ended with all that it started."""
    root = folder.parent
    process = start(["-m", "tests.training_process", str(root), str(folder), str(workers)], REPOSITORY)
    children: list[psutil.Process] = []
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        for child in (process, *children):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.communicate()


def newest_update(folder: Path) -> int:
    """Of the checkpoints, by their names."""
    return max((int(path.stem.removeprefix("step-")) for path in (folder / CHECKPOINTS).glob("step-*")), default=0)


def wait_for_update(process: subprocess.Popen[str], folder: Path, update: int, chance: Chance) -> None:
    """Until a checkpoint of at least that update lies there, and a random moment more."""
    until = time.monotonic() + DEADLINE_S
    while newest_update(folder) < update and process.poll() is None:
        assert time.monotonic() < until, f"no checkpoint of update {update} in {DEADLINE_S} s"
        time.sleep(0.02)
    time.sleep(chance.moment_s())
    assert not process.poll(), process.communicate()[1][-3000:]
    if newest_update(folder) == UPDATES:
        raise EndedBeforeTheKillError


def workers_of(driver: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join([child.name(), *child.cmdline()]):
                found.append(child)
    return found


def end(process: subprocess.Popen[str]) -> str:
    """What a driver that ends well said on stderr."""
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, stderr[-3000:]
    return stdout + stderr


def newest(folder: Path) -> Checkpoint:
    config, drawn = small_fold(folder.parent)
    found = train._checkpoints(config, drawn, str(folder)).newest()
    assert found is not None
    return found[1]


def assert_same_bits(folder: Path, undisturbed: Path) -> None:
    found, expected = newest(folder), newest(undisturbed)
    assert found.progress.step == UPDATES
    assert found.tensors.keys() == expected.tensors.keys()
    assert [name for name in expected.tensors if not torch.equal(found.tensors[name], expected.tensors[name])] == []
    assert losses(found.progress) == losses(expected.progress)


def test_a_killed_worker_leaves_the_weights_as_they_would_have_been(undisturbed: Path, chance: Chance) -> None:
    def killed(folder: Path) -> Path:
        with training(folder) as driver:
            wait_for_update(driver, folder, chance.update(), chance)
            (worker,) = workers_of(driver.pid)
            worker.kill()
            assert "going on from update" in end(driver)
        return folder

    assert_same_bits(redone(killed, undisturbed.with_name("worker-killed")), undisturbed)


def test_a_killed_driver_submitted_again_leaves_the_weights_as_they_would_have_been(
    undisturbed: Path, chance: Chance
) -> None:
    def killed(folder: Path) -> Path:
        with training(folder) as driver:
            wait_for_update(driver, folder, chance.update(), chance)
            driver.kill()
            # At once, while the raylet and the worker of the first are still about to notice.
            with training(folder) as again:
                assert "going on from update" in end(again)
        return folder

    assert_same_bits(redone(killed, undisturbed.with_name("driver-killed")), undisturbed)


def test_a_driver_killed_with_two_workers_goes_on_with_one(undisturbed: Path, chance: Chance) -> None:
    def killed(folder: Path) -> str:
        with training(folder, workers=2) as driver:
            wait_for_update(driver, folder, chance.update(), chance)
            assert len(workers_of(driver.pid)) == 2
            driver.kill()
            with training(folder) as again:
                return end(again)

    said = redone(killed, undisturbed.with_name("two-then-one"))
    assert "going on from update" in said
    found, expected = json.loads(said.splitlines()[0]), losses(newest(undisturbed).progress)
    for epoch, other in zip(found, expected, strict=True):
        assert epoch[0] == other[0]
        # Other episodes would differ by tens of percent, as the epochs' means do.
        assert epoch[1:4] == pytest.approx(other[1:4], rel=tolerances.SAME_TRAINING.bound)
