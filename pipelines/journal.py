"""What a search knows about its trials, on the store: a JSON file of each, from which a killed search goes on."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import CrossValidationConfig
from pipelines.search import ENDED, SearchConfig, Status, TrialEpoch, TrialRecord, applied, values_of

LOG = logging.getLogger(__name__)
CLEANING_S = 30.0
"""How long the end of a search waits for workers that still write to what is to be removed."""


class Journal:
    """The trials of one search, by number. Sent to a worker, it is a copy: only the driver writes."""

    def __init__(self, config: CrossValidationConfig, search: SearchConfig, folder: str) -> None:
        """Reads what lies below `folder`. Raises InputError for a record of another search."""
        self.config, self.search, self.folder = config, search, folder
        self.longest = len(config.folds) * config.training.epochs
        """Epochs of a trial that is not stopped."""
        self.scratch = storage.join(folder, "tune")
        """For Ray Tune, until the search ends."""
        self.records = {number: self.read(number) for number in range(search.trials)}
        # A search that was killed may have left some.
        self._unused = [self._training(number) for number, record in self.records.items() if record.status in ENDED]

    def read(self, number: int) -> TrialRecord:
        """A trial as it lies on the store; one that has not begun where there is nothing."""
        values = values_of(self.search, self.config.training, number)
        uri = self._uri(number)
        data = storage.read_json(uri)
        if data is None:
            return TrialRecord(number=number, values=values)
        record = TrialRecord.from_json(data)
        if record.values != values:
            raise InputError(
                f"expected {uri!r} to be a trial of {values}, found {record.values}; another version of this program "
                f"wrote it: finish the search with that one, or delete {self.folder!r}"
            )
        return record

    def pending(self) -> list[int]:
        """Trials to run, in order: neither complete nor stopped nor diverged."""
        return [number for number, record in self.records.items() if record.status not in ENDED]

    def trial_config(self, number: int) -> CrossValidationConfig:
        """What a trial trains."""
        return applied(self.config, self.records[number].values)

    def position(self, epoch: TrialEpoch) -> int:
        """Epochs that a trial has trained by then, over its folds one after the other."""
        return self.config.folds.index(epoch.fold) * self.config.training.epochs + epoch.epoch

    def begin(self, number: int) -> TrialRecord:
        """A trial starts, or goes on."""
        self.records[number] = replace(self.records[number], status="running", error="", told=False)
        return self.records[number]

    def observe(self, number: int, epoch: TrialEpoch) -> bool:
        """Take an epoch in; False for one that is known: what was trained again after a crash is the same."""
        record = self.records[number]
        if record.knows(epoch.fold, epoch.epoch):
            return False
        self.records[number] = record.with_epoch(epoch)
        return True

    def save(self, number: int) -> None:
        """Make durable what is known of a trial."""
        storage.write_json(self._uri(number), self.records[number].to_json())

    def end(self, number: int, status: Status, error: str = "") -> TrialRecord:
        """A trial is over: make that durable. Its checkpoints go with the next one's end, a failed one's are kept."""
        self.records[number] = replace(self.records[number], status=status, error=error)
        self.save(number)
        self.remove_unused()
        if status in ENDED:
            self._unused.append(self._training(number))  # not now: its workers may still be writing one
        return self.records[number]

    def untold(self) -> list[TrialRecord]:
        """Trials that are over and of whose end the tracker has not heard."""
        return [record for record in self.records.values() if record.status in ENDED and not record.told]

    def told(self, number: int) -> None:
        """The tracker has taken a trial's end."""
        self.records[number] = replace(self.records[number], told=True)
        self.save(number)

    def remove_unused(self, patience_s: float = 0.0) -> None:
        """Remove the checkpoints of trials that are over. What cannot be removed in time waits for the next call."""
        deadline = time.monotonic() + patience_s
        while self._unused:
            self._unused = [folder for folder in self._unused if not _removed(folder)]
            if not self._unused or time.monotonic() >= deadline:
                return
            time.sleep(0.1)

    def clean_up(self, patience_s: float = CLEANING_S) -> None:
        """At the end of a search: remove all that is of no more use, or say what is left of it."""
        self._unused.append(self.scratch)
        self.remove_unused(patience_s)
        for folder in self._unused:
            LOG.warning("could not remove %r: the same command tries again, or delete it", folder)

    def training_folder(self, number: int, fold: int) -> str:
        """Of a trial's checkpoints."""
        return storage.join(self._training(number), f"fold{fold}")

    def _training(self, number: int) -> str:
        return storage.join(self.folder, "training", f"{number:03d}")

    def _uri(self, number: int) -> str:
        return storage.join(self.folder, "trials", f"{number:03d}.json")


def _removed(folder: str) -> bool:
    """False where a worker that still writes there, or a store that is away, got in the way."""
    try:
        storage.remove(folder)
    except OSError:
        return False
    return True
