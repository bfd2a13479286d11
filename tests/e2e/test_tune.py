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
            "--validation-episodes", "4", "--trials", "2", "--concurrency", "1", "--batch-choices", "4",
            "--learning-rate-range", "1e-22", "1e18",  # the fourth trial's is 1e8: not finite within an epoch
            "--out", "recipe.json",
        ]  # fmt: skip

    def submit(self, *more: str) -> Outcome:
        return run([*self.command, *more], self.root)

    def records(self) -> dict[int, dict[str, Any]]:
        """The trials as they lie on the store."""
        return {int(path.stem): json.loads(path.read_text()) for path in self.root.glob("store/searches/*/trials/*")}

    def rewrite(self, number: int, **changes: Any) -> None:
        (path,) = self.root.glob(f"store/searches/*/trials/{number:03d}.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def mlflow(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(f"sqlite:///{self.root}/mlflow.db")

    def runs(self) -> dict[str, Any]:
        """MLflow's runs of the trials, by number."""
        experiment = self.mlflow().get_experiment_by_name("mshnet").experiment_id
        found = self.mlflow().search_runs([experiment])
        return {run.data.params["trial"]: run for run in found if "trial" in run.data.params}


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
    """The same command again, as if the driver had been killed between the first trial's end and its run's."""
    search.rewrite(0, told=False)
    search.mlflow().update_run(search.runs()["0"].info.run_id, status="RUNNING")
    outcome = search.submit()
    assert outcome.code == 0, outcome.stderr[-3000:]
    return outcome


@pytest.fixture(scope="module")
def longer(search: Search, finished: Outcome) -> Outcome:
    """Two trials more. So little training scores next to nothing, so the rung is told of better: one has no chance."""
    for number, record in search.records().items():
        search.rewrite(number, epochs=[epoch | {"validation_miou": 0.9} for epoch in record["epochs"]])
    outcome = search.submit("--trials", "4", "--concurrency", "2")
    assert outcome.code == 0, outcome.stderr[-3000:]
    return outcome


def test_the_killed_search_had_finished_its_first_trial_only(killed: dict[int, dict[str, Any]]) -> None:
    assert killed[0]["status"] == "complete"
    assert [epoch["epoch"] for epoch in killed[0]["epochs"]] == [1, 2]
    assert killed.get(1, {"status": "running"})["status"] == "running"


def test_the_same_command_goes_on_and_repeats_nothing(
    search: Search, killed: dict[int, dict[str, Any]], finished: Outcome
) -> None:
    records = search.records()
    assert records[0] == killed[0], "told again of its end, and else as it was"
    assert records[1]["status"] in ("complete", "stopped")
    assert finished.result["trials"]["running"] == finished.result["trials"]["failed"] == 0
    assert "going on from update" in finished.stderr, "the second trial went on from its checkpoint"
    assert "trial 0: fold" not in finished.stderr
    assert search.runs()["0"].info.status == "FINISHED"
    assert not list(search.root.glob("store/searches/*/training/*")), "checkpoints of trials that are over are removed"


def test_the_result_is_no_worse_than_the_start_and_the_job_takes_the_recipe(search: Search, finished: Outcome) -> None:
    result, records = finished.result, search.records()
    assert result["start_score"] == max(epoch["validation_miou"] for epoch in records[0]["epochs"])
    assert result["score"] >= result["start_score"]
    assert result["best"] == records[result["best_trial"]]["values"]
    assert "its 2 epochs are the search's" in finished.stderr
    recipe = json.loads((search.root / "recipe.json").read_text())
    assert recipe["training"] | result["best"] == recipe["training"]
    taken = [*search.place, "--images-per-shard", "60", "--config", "recipe.json", "--dry-run"]
    planned = run(cross_validate(*taken), search.root)
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


def test_a_longer_search_goes_on_and_stops_what_is_poor(search: Search, finished: Outcome, longer: Outcome) -> None:
    records, trials = search.records(), search.runs()
    assert longer.result["run_id"] == finished.result["run_id"]
    assert "trial 0: fold" not in longer.stderr
    assert "trial 1: fold" not in longer.stderr
    assert (records[2]["status"], len(records[2]["epochs"])) == ("stopped", 1)
    assert trials["2"].data.tags["search.status"] == "stopped early after 1 of 2 epochs"
    assert trials["2"].data.metrics["train/loss"] == records[2]["epochs"][0]["loss"]
    assert records[3]["status"] == "diverged"
    assert not list(search.root.glob("store/searches/*/training/*"))


def test_the_tracker_holds_each_trial_once(search: Search, longer: Outcome) -> None:
    parent, trials = search.mlflow().get_run(longer.result["run_id"]), search.runs()
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["search/score"] == longer.result["score"]
    assert {file.path for file in search.mlflow().list_artifacts(parent.info.run_id)} == {"recipe.json", "trials.txt"}
    assert sorted(trials) == ["0", "1", "2", "3"]
    for number, record in search.records().items():
        trial, epochs = trials[str(number)], [epoch["epoch"] for epoch in record["epochs"]]
        assert trial.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert trial.info.status == ("FAILED" if record["status"] == "diverged" else "FINISHED")
        assert trial.data.tags["search.status"].startswith(record["status"])
        assert trial.data.params["training.learning_rate"] == str(record["values"]["learning_rate"])
        for metric in ("train/loss", "search/score"):
            points = search.mlflow().get_metric_history(trial.info.run_id, metric)
            assert sorted(point.step for point in points) == epochs  # of one millisecond they come in any order
