"""The scheduler's decisions and their memory. Ray Tune's own code decides; no cluster is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from pipelines.config import CrossValidationConfig
from pipelines.journal import Journal
from pipelines.recipes import named
from pipelines.search import SearchConfig, TrialRecord
from pipelines.trials import Scheduler, without_workers_bars

SEARCH = SearchConfig(trials=7, grace_epochs=1, reduction_factor=2.0)
# By trial, the validation mIoU of each epoch. At most half may go on after 1, 2 and 4 epochs.
CURVES = [
    (0.20, 0.10, 0.10, 0.10),  # the start: poor, but never stopped
    (0.40, 0.45, 0.50, 0.50),
    (0.10, 0.60, 0.60, 0.60),  # poor after one epoch
    (0.50, 0.30, 0.70, 0.60),
    (0.42, 0.43, 0.90, 0.90),
    (0.35, 0.90, 0.90, 0.90),
    (0.48, 0.10, 0.10, 0.10),  # the best so far counts
]


class Runs:
    """Stands in for the tracker; keeps what it is told."""

    def __init__(self) -> None:
        self.ended: dict[int, str] = {}

    def trial(self, record: TrialRecord) -> str:
        return f"run {record.number}"

    def score(self, record: TrialRecord, position: int) -> None:
        assert position == len(record.epochs)

    def over(self, record: TrialRecord) -> None:
        self.ended[record.number] = record.status


def config(epochs: int = 4, folds: tuple[int, ...] = (0,)) -> CrossValidationConfig:
    demo = named("demo", "")
    return replace(demo, folds=folds, training=replace(demo.training, epochs=epochs))


def scheduler(journal: Journal, runs: Any) -> Scheduler:
    return Scheduler(journal, runs, runs.over)


def started(scheduler: Scheduler, number: int, attempt: str = "a") -> Any:
    trial = SimpleNamespace(trial_id=f"{attempt}{number}", config={"trial": number, "run_id": ""})
    scheduler.on_trial_add(None, trial)
    return trial


def reported(scheduler: Scheduler, trial: Any, fold: int, epoch: int, miou: float) -> str:
    result = {"fold": fold, "epoch": epoch, "loss": 1.0, "validation_miou": miou}
    return scheduler.on_trial_result(None, trial, result)


def events() -> Iterator[tuple[int, int]]:
    """One trial after the other, as with concurrency 1."""
    return ((number, epoch) for number in range(len(CURVES)) for epoch in range(1, 5))


def searched(folder: Path, killed_before: tuple[int, int] | None = None) -> Journal:
    """The whole search; killed before an event, another scheduler goes on from the files."""
    runs = Runs()
    journal = Journal(config(), SEARCH, str(folder))
    judge, running = scheduler(journal, runs), dict[int, Any]()
    for number, epoch in events():
        if (number, epoch) == killed_before:
            journal = Journal(config(), SEARCH, str(folder))
            judge, running = scheduler(journal, runs), {}
        if journal.records[number].status == "stopped":
            continue
        if number not in running:
            running[number] = started(judge, number, attempt=str(killed_before))
        decision = reported(judge, running[number], 0, epoch, CURVES[number][epoch - 1])
        assert (decision == TrialScheduler.STOP) == (journal.records[number].status == "stopped")
        if epoch == 4 and decision == TrialScheduler.CONTINUE:
            judge.on_trial_complete(None, running[number], {})
    return journal


def test_poor_trials_are_stopped_and_the_start_never(tmp_path: Path) -> None:
    journal = searched(tmp_path)
    outcome = {number: (record.status, len(record.epochs)) for number, record in journal.records.items()}
    assert outcome == {
        0: ("complete", 4),
        1: ("complete", 4),
        2: ("stopped", 1),  # 0.10 against the median 0.30 of 0.20, 0.40
        3: ("complete", 4),
        4: ("stopped", 2),  # 0.43 against the median 0.45 of 0.20, 0.45, 0.50
        5: ("stopped", 1),  # 0.35 against the median 0.40 of 0.20, 0.40, 0.10, 0.50, 0.42
        6: ("complete", 4),  # 0.48 is below the median at the end, but then there is nothing left to save
    }


@pytest.mark.parametrize("killed_before", [event for event in events() if event != (0, 1)])
def test_a_search_killed_anywhere_ends_as_if_it_had_not_been(tmp_path: Path, killed_before: tuple[int, int]) -> None:
    undisturbed = searched(tmp_path / "undisturbed")
    assert searched(tmp_path / "killed", killed_before).records == undisturbed.records


def test_an_epoch_reported_again_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(config(), SEARCH, str(tmp_path))
    judge = scheduler(journal, Runs())
    for number in (1, 2):
        trial = started(judge, number)
        reported(judge, trial, 0, 1, 0.5)
    before = journal.records[2]
    assert reported(judge, trial, 0, 1, 0.0) == TrialScheduler.CONTINUE
    assert journal.records[2] == before


def test_folds_are_one_course_after_the_other(tmp_path: Path) -> None:
    """With folds 3 and 1 of one epoch each: stopped on the second fold, by the mean of both."""
    search = replace(SEARCH, trials=3)
    journal = Journal(config(epochs=1, folds=(3, 1)), search, str(tmp_path))
    judge = scheduler(journal, Runs())
    for number, (first, second) in enumerate([(0.5, 0.5), (0.6, 0.6)]):
        trial = started(judge, number)
        assert reported(judge, trial, 3, 1, first) == TrialScheduler.CONTINUE
        assert reported(judge, trial, 1, 1, second) == TrialScheduler.CONTINUE
        judge.on_trial_complete(None, trial, {})
    assert [journal.records[number].status for number in range(3)] == ["complete", "complete", "running"]
    assert journal.records[1].score == pytest.approx(0.6)
    assert reported(judge, started(judge, 2), 3, 1, 0.5) == TrialScheduler.STOP
    assert journal.records[2].status == "stopped"


def test_a_diverged_trial_ends_with_its_message_and_a_failed_one_is_tried_again(tmp_path: Path) -> None:
    journal, runs = Journal(config(), SEARCH, str(tmp_path)), Runs()
    judge = scheduler(journal, runs)
    for number, how in ((1, "diverged"), (2, "failed")):
        result = {"fold": 0, "validation_miou": 0.0, "ended": how, "error": "loss nan at update 3"}
        assert judge.on_trial_result(None, started(judge, number), result) == TrialScheduler.STOP
        assert (journal.records[number].status, journal.records[number].error) == (how, "loss nan at update 3")
    assert runs.ended == {1: "diverged", 2: "failed"}
    assert Journal(config(), SEARCH, str(tmp_path)).pending() == [0, 2, 3, 4, 5, 6]


def test_a_trial_that_ends_before_its_last_epoch_is_not_complete(tmp_path: Path) -> None:
    journal = Journal(config(), SEARCH, str(tmp_path))
    judge = scheduler(journal, Runs())
    trial = started(judge, 0)
    reported(judge, trial, 0, 1, 0.5)
    judge.on_trial_complete(None, trial, {})
    assert journal.records[0].status == "running"
    assert trial.config["run_id"] == "run 0"


def test_the_bars_of_workers_are_off_for_the_search_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.experimental import tqdm_ray

    monkeypatch.setenv("RAY_TQDM_PATCH_PRINT", "0")
    bars = tqdm_ray.instance()
    own = bars.process_state_update

    def interrupted() -> None:
        with without_workers_bars():
            assert bars.process_state_update({"no": "state"}) is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert bars.process_state_update == own
