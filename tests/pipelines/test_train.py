"""When a fold counts as trained, and how often it is tried again: its workers replaced by ones that fail as told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mshnet.errors import TrainingDivergedError
from pipelines import train
from pipelines.checkpoints import CHECKPOINTS, Progress, name_of
from pipelines.config import CrossValidationConfig
from pipelines.drawn import DrawnTraining
from tests.pipelines.drawn_fold import UPDATES, small_config


@dataclass
class Fold:
    """Of four updates, in a folder of its own."""

    config: CrossValidationConfig
    drawn: DrawnTraining
    folder: Path

    def write(self, step: int) -> Path:
        checkpoints = train._checkpoints(self.config, self.drawn, str(self.folder))
        checkpoints.write(Progress(step=step), {"relation.weight": torch.full((3,), float(step))})
        return self.folder / CHECKPOINTS / name_of(step)

    def fit(self) -> Progress:
        return train.fit(self.config, self.drawn, str(self.folder), "")


@pytest.fixture
def fold(tmp_path: Path) -> Fold:
    drawn = DrawnTraining(
        fold=0, folder="drawn", store="store", split_lists="rule", selection="held-out classes", base_classes=(1, 2),
        left_out=(), training_pairs=2, removed_pairs=0, pairs_sha256="a", validation_sha256="b",
    )  # fmt: skip
    return Fold(small_config(tmp_path), drawn, tmp_path / "fold")


def runs(monkeypatch: pytest.MonkeyPatch, *outcomes: Callable[[], Exception | None]) -> list[int]:
    """What each run of the workers does; returns the numbers of those that were made."""
    made: list[int] = []

    def run(*_: Any) -> Exception | None:
        made.append(len(made))
        return outcomes[made[-1]]()

    monkeypatch.setattr(train, "_run", run)
    return made


def test_failures_with_progress_in_between_are_without_number(fold: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(step: int) -> Callable[[], Exception | None]:
        return lambda: (fold.write(step), RuntimeError("a worker was lost"))[1]

    made = runs(monkeypatch, lost(1), lost(2), lost(3), lambda: (fold.write(UPDATES), None)[1])
    assert fold.fit().step == UPDATES
    assert made == [0, 1, 2, 3]


@pytest.mark.parametrize("reached", [0, 2])
def test_a_failure_without_progress_is_the_folds(fold: Fold, monkeypatch: pytest.MonkeyPatch, reached: int) -> None:
    trouble = RuntimeError("a worker was lost")
    if reached:
        fold.write(reached)
    made = runs(monkeypatch, lambda: trouble)
    with pytest.raises(RuntimeError) as raised:
        fold.fit()
    assert raised.value is trouble
    assert made == [0]


def test_what_another_try_would_meet_again_ends_the_fold_whatever_was_reached(
    fold: Fold, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged() -> Exception | None:
        fold.write(2)
        raise TrainingDivergedError("fold 0 diverged")

    made = runs(monkeypatch, diverged)
    with pytest.raises(TrainingDivergedError):
        fold.fit()
    assert made == [0]


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_a_last_checkpoint_that_is_damaged_or_lost_is_trained_again(
    fold: Fold, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def ends_well(spoil: bool) -> Callable[[], None]:
        def run() -> None:
            fold.write(UPDATES - 1)
            path = fold.write(UPDATES)
            if spoil and damage == "lost":
                path.unlink()
            elif spoil:
                path.write_bytes(path.read_bytes()[:-1])

        return run

    made = runs(monkeypatch, ends_well(spoil=True), ends_well(spoil=False))
    assert fold.fit().step == UPDATES
    assert made == [0, 1]


def test_a_training_that_never_comes_to_its_end_is_no_trained_fold(fold: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    made = runs(monkeypatch, *[lambda: (fold.write(2), None)[1]] * 3)
    with pytest.raises(RuntimeError, match=r"sound checkpoint of update 4, found twice that the newest is of 2"):
        fold.fit()
    assert made == [0, 1]
