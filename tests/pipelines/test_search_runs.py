"""A search in the tracker: what its runs say, and that they are found again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import CrossValidationConfig
from pipelines.recipes import named
from pipelines.search import SearchConfig, TrialEpoch, TrialRecord, values_of
from pipelines.search_runs import SearchRuns
from pipelines.tracking import Tracker

SEARCH = SearchConfig(trials=2)


@pytest.fixture
def config(tmp_path: Path, empty_database: bytes) -> CrossValidationConfig:
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    return replace(named("demo", ""), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", folds=(2, 0))


def client(config: CrossValidationConfig) -> Any:
    return Tracker(config.tracking_uri, config.experiment)._client()


def trial(config: CrossValidationConfig, number: int) -> TrialRecord:
    epochs = [TrialEpoch(fold=2, epoch=epoch, loss=1 / epoch, validation_miou=0.25 * epoch) for epoch in (1, 2)]
    last = TrialEpoch(fold=0, epoch=1, loss=2.0, validation_miou=0.1)
    values = values_of(SEARCH, config.training, number)
    return TrialRecord(number=number, values=values, status="stopped", epochs=[*epochs, last])


def test_a_stopped_trial_has_its_curves_and_says_so(config: CrossValidationConfig) -> None:
    runs, record = SearchRuns.start(config, SEARCH, "key", {"dataset": "shapes"}), trial(config, 1)
    run_id = runs.trial(record)
    fold_run = runs.fold(1, run_id, 2)
    Tracker(config.tracking_uri, config.experiment).log_metrics(fold_run, {"train/loss": 1.0}, 1)
    runs.score(record, 3)
    runs.end(record, longest=4)

    found = client(config).get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["search.status"] == "stopped early after 3 of 4 epochs"
    assert found.data.tags["mlflow.parentRunId"] == runs.parent
    assert found.data.metrics["search/score"] == pytest.approx((0.5 + 0.1) / 2)
    assert found.data.params["training.learning_rate"] == str(record.values.learning_rate)
    # The second epoch is the one that the worker did not come to log.
    losses = client(config).get_metric_history(fold_run, "train/loss")
    assert [(point.step, point.value) for point in losses] == [(1, 1.0), (2, 0.5)]
    assert client(config).get_run(fold_run).info.status == "FINISHED"


def test_the_same_search_finds_its_runs_and_closes_what_did_not_end(config: CrossValidationConfig) -> None:
    runs, record = SearchRuns.start(config, SEARCH, "key", {}), trial(config, 0)
    first = runs.trial(record)
    again = SearchRuns.start(config, SEARCH, "key", {})
    assert (again.parent, again.trial(record)) == (runs.parent, first)
    assert SearchRuns.start(config, SEARCH, "another key", {}).parent != runs.parent
    again.finish("KILLED", [0, 1])
    assert [client(config).get_run(run).info.status for run in (first, runs.parent)] == ["KILLED", "KILLED"]


def test_a_diverged_trial_is_failed_and_says_why(config: CrossValidationConfig) -> None:
    runs = SearchRuns.start(config, SEARCH, "key", {})
    record = replace(trial(config, 1), status="diverged", error="loss nan at update 3")
    runs.end(record, longest=4)
    found = client(config).get_run(runs.trial(record))
    assert (found.info.status, found.data.tags["search.status"]) == ("FAILED", "diverged loss nan at update 3")


def test_a_trial_whose_driver_was_killed_before_it_closed_its_run_is_closed(config: CrossValidationConfig) -> None:
    runs, record = SearchRuns.start(config, SEARCH, "key", {}), trial(config, 1)
    run_id, fold_run = runs.trial(record), runs.fold(1, runs.trial(record), 2)
    again = SearchRuns.start(config, SEARCH, "key", {})
    assert again.end(record, longest=4)
    again.finish("FINISHED", [])
    for closed in (run_id, fold_run, runs.parent):
        assert client(config).get_run(closed).info.status == "FINISHED"
    assert client(config).get_run(run_id).data.tags["search.status"] == "stopped early after 3 of 4 epochs"


def test_a_tracker_that_is_away_stops_no_search(
    config: CrossValidationConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs, record = SearchRuns.start(config, SEARCH, "key", {}), trial(config, 1)

    def away(*_: Any, **__: Any) -> str:
        raise OSError("connection refused")

    for method in ("start_child", "log_metrics", "set_tags", "finish"):
        monkeypatch.setattr(Tracker, method, away)
    assert runs.trial(record) == ""
    runs.score(record, 3)
    assert not runs.end(record, longest=4), "so that it is told another time"
    runs.finish("FINISHED", [1])
    assert "the tracker did not answer (connection refused); going on" in caplog.text
