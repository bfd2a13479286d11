"""The search as a command: its driver killed in the middle, gone on with by the same command, its recipe used."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import REPOSITORY, SMALL, Outcome, cross_validate, run, start

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


class Search:
    """A search on a store and a tracker of its own."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root = root
        self.place = ["--dataset", "pascal", "--source", str(source), "--store", "store"]
        self.command = [
            str(REPOSITORY / "pipelines" / "tune.py"), *self.place, "--tracking-uri", "sqlite:///mlflow.db",
            *SMALL, "--folds", "0", "--image-size-px", "33", "--episodes-per-epoch", "16", "--dropout", "0",
            "--trials", "4", "--concurrency", "1", "--batch-choices", "4", "--out", "recipe.json",
            "--learning-rate-range", "1e-9", "1e6",  # the fourth trial's is 200: its loss is soon not finite
        ]  # fmt: skip

    def submit(self, *more: str) -> Outcome:
        return run([*self.command, *more], self.root)

    def records(self) -> dict[int, dict[str, Any]]:
        """The trials as they lie on the store."""
        return {int(path.stem): json.loads(path.read_text()) for path in self.root.glob("store/searches/*/trials/*")}


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Search:
    return Search(tmp_path_factory.mktemp("search"), pictures)


@pytest.fixture(scope="module")
def killed(search: Search) -> dict[int, dict[str, Any]]:
    """Killed in the second trial; what the store then holds."""
    process = start(search.command, search.root)
    family: list[psutil.Process] = []
    try:
        _wait(lambda: _second_trial_has_a_checkpoint(search, process), "a checkpoint of the second trial")
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.communicate()
    _wait(lambda: not any(member.is_running() and member.status() != "zombie" for member in family), "Ray's end")
    return search.records()


def _second_trial_has_a_checkpoint(search: Search, process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, process.communicate()[1][-3000:]
    return bool(list(search.root.glob("store/searches/*/training/001/**/*.safetensors")))


def _wait(met: Any, what: str) -> None:
    deadline = time.monotonic() + 300
    while not met():
        assert time.monotonic() < deadline, f"no {what} in 300 s"
        time.sleep(0.05)  # polling a condition with a deadline


@pytest.fixture(scope="module")
def finished(search: Search, killed: dict[int, dict[str, Any]]) -> Outcome:
    """The same command again."""
    outcome = search.submit()
    assert outcome.code == 0, outcome.stderr[-3000:]
    return outcome


def test_the_killed_search_had_finished_its_first_trial_only(killed: dict[int, dict[str, Any]]) -> None:
    assert killed[0]["status"] == "complete"
    assert [epoch["epoch"] for epoch in killed[0]["epochs"]] == [1, 2]
    assert killed.get(1, {"status": "running"})["status"] == "running"
    assert not {2, 3} & killed.keys()


def test_the_same_command_goes_on_and_repeats_nothing(
    search: Search, killed: dict[int, dict[str, Any]], finished: Outcome
) -> None:
    records = search.records()
    assert records[0] == killed[0]
    assert {records[number]["status"] for number in (1, 2)} <= {"complete", "stopped"}
    assert records[3]["status"] == "diverged"
    assert finished.result["trials"]["running"] == finished.result["trials"]["failed"] == 0
    assert "going on from update" in finished.stderr, "the second trial went on from its checkpoint"
    assert "trial 0: fold" not in finished.stderr
    assert not list(search.root.glob("store/searches/*/training/*")), "checkpoints of trials that are over are removed"


def test_the_tracker_holds_each_trial_once(search: Search, finished: Outcome) -> None:
    from mlflow import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{search.root}/mlflow.db")
    parent = client.get_run(finished.result["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["search/score"] == finished.result["score"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"recipe.json", "trials.txt"}
    trials = _children(search, parent.info.run_id)
    assert sorted(trials) == ["0", "1", "2", "3"]
    for number, record in search.records().items():
        trial, epochs = trials[str(number)], [epoch["epoch"] for epoch in record["epochs"]]
        assert trial.info.status == ("FAILED" if record["status"] == "diverged" else "FINISHED")
        assert trial.data.tags["search.status"].startswith(record["status"])
        assert trial.data.params["training.learning_rate"] == str(record["values"]["learning_rate"])
        for metric in ("train/loss", "search/score"):
            assert [point.step for point in client.get_metric_history(trial.info.run_id, metric)] == epochs


def test_the_result_is_no_worse_than_the_start_and_the_job_takes_the_recipe(search: Search, finished: Outcome) -> None:
    result, records = finished.result, search.records()
    assert result["start_score"] == max(epoch["validation_miou"] for epoch in records[0]["epochs"])
    assert result["score"] >= result["start_score"]
    assert result["best"] == records[result["best_trial"]]["values"]
    recipe = json.loads((search.root / "recipe.json").read_text())
    assert recipe["training"] | result["best"] == recipe["training"]
    planned = run(cross_validate("--config", "recipe.json", "--dry-run"), search.root)
    assert planned.code == 0, planned.stderr[-3000:]
    assert {"draw training episodes of fold 0", "seal the store"} <= set(planned.result["done"])
    assert [stage for stage in planned.result["run"] if stage.startswith("train")] == [
        f"train fold {fold}" for fold in range(4)
    ]


def test_a_finished_search_is_only_told_again(search: Search, finished: Outcome) -> None:
    again = search.submit()
    assert again.code == 0, again.stderr[-3000:]
    assert again.result == finished.result
    assert "trials:" not in again.stderr, "Ray Tune is not even started"


def test_a_longer_search_goes_on_and_stops_what_is_poor(search: Search, finished: Outcome) -> None:
    """So little training scores next to nothing, so the rung is told of better: the fifth trial has no chance."""
    for path in search.root.glob("store/searches/*/trials/*.json"):
        record = json.loads(path.read_text())
        for epoch in record["epochs"]:
            epoch["validation_miou"] = 0.9
        path.write_text(json.dumps(record))
    longer = search.submit("--trials", "5")
    assert longer.code == 0, longer.stderr[-3000:]
    assert longer.result["trials"]["stopped"] == finished.result["trials"]["stopped"] + 1
    record = search.records()[4]
    assert (record["status"], len(record["epochs"])) == ("stopped", 1)
    trials = _children(search, longer.result["run_id"])
    assert longer.result["run_id"] == finished.result["run_id"]
    assert trials["4"].info.status == "FINISHED"
    assert trials["4"].data.tags["search.status"] == "stopped early after 1 of 2 epochs"
    assert trials["4"].data.metrics["train/loss"] == record["epochs"][0]["loss"]


def _children(search: Search, run_id: str) -> dict[str, Any]:
    from mlflow import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{search.root}/mlflow.db")
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return {run.data.params["trial"]: run for run in found}
