"""A search in the tracker: a run of its own, its trials below it. The tracker is told and may be away."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.config import CrossValidationConfig
from pipelines.search import SearchConfig, TrialRecord, applied
from pipelines.tracking import Tracker

LOG = logging.getLogger(__name__)
STATUS_TAG = "search.status"


@dataclass
class SearchRuns:
    """Runs by trial number. The same search submitted again finds the same ones."""

    config: CrossValidationConfig
    parent: str
    tags: Mapping[str, str]
    started: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def start(config: CrossValidationConfig, search: SearchConfig, key: str, tags: Mapping[str, str]) -> SearchRuns:
        """Open the search's run. Raises what the tracker does."""
        name = f"search {config.data_title} {config.shot}-shot {config.model.backbone}"
        params = {**config.to_json(), "search": search.to_json()}
        tags = {**tags, "search": key}
        return SearchRuns(config, _tracker(config).start_parent(name, params, tags, f"search-{key}"), tags)

    def trial(self, record: TrialRecord) -> str:
        """Run id of a trial, opened at the first call; "" where the tracker is away."""
        number = record.number
        if not self.started.get(number):
            params = {**applied(self.config, record.values).to_json(), "trial": number}
            tags = {**self.tags, "trial": str(number)}
            name = f"trial {number}" + (" (start)" if number == 0 else "")
            self.started[number] = _asked(
                _tracker(self.config).start_child, self.parent, name, params, tags, f"trial-{number}"
            )
        return self.started[number]

    def fold(self, number: int, trial_run: str, fold: int) -> str:
        """Run id for a fold's curves: the trial's own, or with several folds one below it."""
        if len(self.config.folds) == 1 or not trial_run:
            return trial_run
        params, tags = {"trial": number, "fold": fold}, {**self.tags, "trial": str(number), "fold": str(fold)}
        return _asked(_tracker(self.config).start_child, trial_run, f"fold {fold}", params, tags, f"fold-{fold}")

    def score(self, record: TrialRecord, position: int) -> None:
        """A point of the trial's curve."""
        _told(_tracker(self.config).log_metrics, self.trial(record), {"search/score": record.score or 0.0}, position)

    def end(self, record: TrialRecord, longest: int) -> bool:
        """Close a trial's runs, saying how it ended; whether the tracker took all of it."""
        tracker, run_id = _tracker(self.config), self.trial(record)
        words = {"stopped": f"stopped early after {len(record.epochs)} of {longest} epochs"}.get(
            record.status, f"{record.status} {record.error}".strip()
        )
        status = "FAILED" if record.status in ("diverged", "failed") else "FINISHED"
        folds = {fold: self.fold(record.number, run_id, fold) for fold in {epoch.fold for epoch in record.epochs}}
        taken = [_told(tracker.set_tags, run_id, {STATUS_TAG: words})]
        taken += [_told(_log_missing, tracker, fold_run, record, fold) for fold, fold_run in folds.items()]
        taken += [_told(tracker.finish, ended, status) for ended in {*folds.values(), run_id}]
        return all(taken)

    def log_result(self, result: Mapping[str, Any], recipe: bytes, table: str) -> None:
        """What came out, on the search's run."""
        tracker = _tracker(self.config)
        scores = {f"search/{name}": result[name] for name in ("score", "start_score") if result[name] is not None}
        _told(tracker.log_metrics, self.parent, scores)
        _told(tracker.set_tags, self.parent, {"search.best_trial": str(result["best_trial"])})
        _told(tracker.log_bytes, self.parent, recipe, "recipe.json")
        _told(tracker.log_bytes, self.parent, table.encode(), "trials.txt")

    def finish(self, status: str, unfinished: Sequence[int]) -> None:
        """Close the search's run; those of trials that did not come to an end are KILLED."""
        tracker = _tracker(self.config)
        ended = {self.started[number]: "KILLED" for number in unfinished if self.started.get(number)}
        for run_id, how in {**ended, self.parent: status}.items():
            _told(tracker.finish, run_id, how)


def _log_missing(tracker: Tracker, run_id: str, record: TrialRecord, fold: int) -> None:
    """The epochs that a worker was stopped before it could log."""
    logged = tracker.logged_epochs(run_id)
    for known in record.epochs:
        if known.fold == fold and known.epoch not in logged:
            values = {"train/loss": known.loss, "validation/miou": known.validation_miou}
            tracker.log_metrics(run_id, values, known.epoch)


def _tracker(config: CrossValidationConfig) -> Tracker:
    return Tracker(config.tracking_uri, config.experiment)


def _asked(what: Callable[..., str], *arguments: Any) -> str:
    """The tracker's answer; "" where there is none."""
    answers: list[str] = []
    _told(lambda: answers.append(what(*arguments)))
    return answers[0] if answers else ""


def _told(what: Callable[..., object], *arguments: Any) -> bool:
    """Whether the tracker took it: whatever ails it, the search goes on."""
    try:
        what(*arguments)
    except Exception as error:  # noqa: BLE001 - the journal has the numbers
        LOG.warning("the tracker did not answer (%s); going on", error)
        return False
    return True
