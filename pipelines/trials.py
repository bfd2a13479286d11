"""Trials under Ray Tune: the driver function of one, and the scheduler that stops the poor ones.

Alone in using Ray Tune. What it must not forget lies in the journal, so of Tune's own state nothing is kept.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.experimental import tqdm_ray
from ray.train import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from mshnet.errors import InputError, TrainingDivergedError
from pipelines import dag, progress, storage, train
from pipelines.checkpoints import Progress
from pipelines.config import CrossValidationConfig
from pipelines.drawn import DrawnTraining
from pipelines.journal import Journal
from pipelines.search import TrialEpoch, TrialRecord, best, ending
from pipelines.search_runs import SearchRuns

LOG = logging.getLogger(__name__)
SCORE, FOLD, EPOCH, ENDED, ERROR = "validation_miou", "fold", "epoch", "ended", "error"
"""Keys of what a trial reports."""


@dataclass(frozen=True)
class Trials:
    """What every trial's driver function needs."""

    config: CrossValidationConfig
    drawn: Mapping[int, DrawnTraining]
    """By fold."""
    journal: Journal
    runs: SearchRuns


def run(trials: Trials, concurrency: int) -> None:
    """Train the journal's pending trials, as many at a time as said, and leave there what became of them."""
    journal = trials.journal
    # Ctrl-C must end the search; Tune's files of metrics and its own tables on stdout are of no use to us.
    for setting, value in (
        ("TUNE_DISABLE_SIGINT_HANDLER", "1"),
        ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1"),
        ("RAY_AIR_NEW_OUTPUT", "0"),
    ):
        os.environ.setdefault(setting, value)
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # it misses those files
    total, done = len(journal.records), len(journal.records) - len(journal.pending())
    with without_workers_bars(), progress.bar(total=total, initial=done, desc="trials", unit="trial") as bar:

        def over(record: TrialRecord) -> None:
            if trials.runs.end(record, journal.longest):
                journal.told(record.number)
            LOG.info("%s", ending(record, journal.longest))
            bar.update()
            if leading := best(journal.records.values()):
                bar.set_postfix_str(f"best mIoU {100 * (leading.score or 0):.1f} (trial {leading.number})")

        for result in _tuner(trials, concurrency, over).fit():
            if result.error is not None:
                over(journal.end(result.config["trial"], "failed", _words(result.error)))


@contextmanager
def without_workers_bars() -> Iterator[None]:
    """No bars of Ray's workers for the time of a block: trials have lines of their own.

    Workers of stopped trials cannot close their bars, and all bars look alike.
    """
    bars = tqdm_ray.instance()
    before = bars.process_state_update
    bars.process_state_update = lambda state: None
    try:
        yield
    finally:
        bars.process_state_update = before


def _tuner(trials: Trials, concurrency: int, over: Callable[[TrialRecord], None]) -> tune.Tuner:
    path, filesystem = storage.for_arrow(trials.journal.scratch)

    def trial(given: dict[str, Any]) -> None:
        train_trial(trials, given["trial"], given["run_id"])

    return tune.Tuner(
        # A driver only waits for its workers, which hold the cores; Tune wants it to hold something: a byte.
        tune.with_resources(trial, tune.PlacementGroupFactory([{"memory": 1}])),
        param_space={"trial": tune.grid_search(trials.journal.pending()), "run_id": ""},
        tune_config=tune.TuneConfig(
            scheduler=Scheduler(trials.journal, trials.runs, over),
            max_concurrent_trials=concurrency,
            trial_name_creator=lambda started: f"trial-{started.config['trial']:03d}",
        ),
        run_config=tune.RunConfig(
            name="experiment",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=trials.config.compute.max_failures),
            verbose=0,
        ),
    )


def _words(error: BaseException) -> str:
    cause = dag.cause(error)
    return str(cause) if isinstance(cause, InputError) else f"{type(cause).__name__}: {cause}"


def train_trial(trials: Trials, number: int, run_id: str) -> None:
    """A trial's driver function: its folds one after the other, each going on from its last checkpoint."""
    journal = trials.journal
    config = journal.trial_config(number)
    for fold, drawn in trials.drawn.items():
        folder = journal.training_folder(number, fold)
        try:
            _report_missed(journal, number, fold, train.progress(config, drawn, folder))
            if not journal.read(number).knows(fold, config.training.epochs):
                curves = trials.runs.fold(number, run_id, fold)
                reached = train.fit(config, drawn, folder, curves, callbacks=[FoldReport(fold)])
                _report_missed(journal, number, fold, reached)
        except TrainingDivergedError as error:
            tune.report({SCORE: 0.0, FOLD: fold, ENDED: "diverged", ERROR: str(error)})
            return
        except (InputError, TrainingFailedError) as error:  # it has been tried again as often as is of use
            tune.report({SCORE: 0.0, FOLD: fold, ENDED: "failed", ERROR: _words(error)})
            return


def _report_missed(journal: Journal, number: int, fold: int, reached: Progress) -> None:
    """Epochs that a checkpoint holds and the journal does not: trained just before a crash."""
    known = journal.read(number)  # as it is now, not when the search began
    for record in reached.history:
        if not known.knows(fold, record.epoch) and record.validation_miou is not None:
            tune.report({SCORE: record.validation_miou, FOLD: fold, EPOCH: record.epoch, "loss": record.loss})


class FoldReport(TuneReportCallback):  # type: ignore[misc]  # Ray has no types
    """Hands the workers' epochs to Tune, and says of which fold they are."""

    def __init__(self, fold: int) -> None:
        super().__init__()
        self._fold = fold

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Rank 0's numbers: they are the same on every rank."""
        super().after_report(run_context, [{**metrics[0], FOLD: self._fold}], checkpoint)


class Scheduler(ASHAScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (https://arxiv.org/abs/1810.05934) whose memory is the journal.

    Trials are compared at equal numbers of epochs, over their folds one after the other, by the best score so far.
    The start is never stopped: it is what the result must not be worse than, so it is scored in full.
    """

    def __init__(self, journal: Journal, runs: SearchRuns, over: Callable[[TrialRecord], None]) -> None:
        """`over` is told of a trial that has come to its end, after the journal."""
        search = journal.search
        super().__init__(
            time_attr="position",
            metric=SCORE,
            mode="max",
            max_t=journal.longest,
            grace_period=search.grace_epochs,
            reduction_factor=search.reduction_factor,
            stop_last_trials=False,  # the last epoch ends by itself, and cleanly
        )
        self._journal, self._runs, self._over = journal, runs, over
        for number in journal.records.keys() - set(journal.pending()):
            past = SimpleNamespace(trial_id=f"recorded-{number}")
            super().on_trial_add(None, past)
            self._recall(past, number)

    def _recall(self, trial: Any, number: int) -> None:
        """Fill the rungs with what a trial has reached. What was decided by it then is not decided again."""
        for record in self._journal.records[number].prefixes():
            self._compare(trial, record)

    def _compare(self, trial: Any, record: TrialRecord) -> str:
        at = {"position": self._journal.position(record.epochs[-1]), SCORE: record.score}
        return str(super().on_trial_result(None, trial, at))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Before a trial starts, and again after a lost driver function."""
        super().on_trial_add(tune_controller, trial)
        number = trial.config["trial"]
        trial.config["run_id"] = self._runs.trial(self._journal.begin(number))
        self._recall(trial, number)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on. Its epoch is recorded only then: a crash in between decides again."""
        number, journal = trial.config["trial"], self._journal
        if result.get(ENDED):
            self._over(journal.end(number, result[ENDED], result[ERROR]))
            return str(self.STOP)
        epoch = TrialEpoch(fold=result[FOLD], epoch=result[EPOCH], loss=result["loss"], validation_miou=result[SCORE])
        if not journal.observe(number, epoch):
            return str(self.CONTINUE)
        LOG.info(
            "trial %d: fold %d, epoch %d/%d, validation mIoU %.1f",
            number, epoch.fold, epoch.epoch, journal.config.training.epochs, 100 * epoch.validation_miou,
        )  # fmt: skip
        decision = self._compare(trial, journal.records[number])
        if number == 0 or journal.position(epoch) >= journal.longest:
            decision = str(self.CONTINUE)
        self._runs.score(journal.records[number], journal.position(epoch))
        if decision == self.STOP:
            self._over(journal.end(number, "stopped"))
        else:
            journal.save(number)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """After a stop too."""
        record = self._journal.records[trial.config["trial"]]
        if record.status == "running" and len(record.epochs) == self._journal.longest:
            self._over(self._journal.end(record.number, "complete"))
