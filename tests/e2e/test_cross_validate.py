"""The whole job, and what a second submission, a loss and other workers make of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.compare import Side, compared
from pipelines.judged_run import read_run
from tests import tolerances
from tests.e2e.conftest import SMALL, Outcome, cross_validate, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


class Job:
    """One store and tracker, shared by the tests that look at the same run."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root = root
        self.flags = [
            "--dataset", "pascal", "--source", str(source), "--store", "store", "--folds", "0", "2",
            "--tracking-uri", "sqlite:///mlflow.db", *SMALL,
        ]  # fmt: skip

    def submit(self, *more: str) -> Outcome:
        return run(cross_validate(*self.flags, *more), self.root)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Job:
    return Job(tmp_path_factory.mktemp("job"), pictures)


@pytest.fixture(scope="module")
def planned(job: Job) -> Outcome:
    """Before anything ran."""
    return job.submit("--dry-run")


@pytest.fixture(scope="module")
def first(job: Job, planned: Outcome) -> Outcome:
    """The first submission."""
    outcome = job.submit()
    assert outcome.code == 0, outcome.stderr[-3000:]
    return outcome


def test_a_dry_run_names_every_stage_and_writes_nothing(job: Job, planned: Outcome) -> None:
    assert planned.code == 0, planned.stderr[-3000:]
    stages = planned.result["run"]
    assert stages[:3] == ["preprocess 1/3", "preprocess 2/3", "preprocess 3/3"]
    assert {"train fold 0", "evaluate fold 2", "register fold 2", "report"} <= set(stages)
    assert planned.result["done"] == []


def test_the_last_line_is_the_fold_table(job: Job, first: Outcome) -> None:
    result = first.result
    assert [fold["fold"] for fold in result["folds"]] == [0, 2]
    for fold in result["folds"]:
        assert 0 <= fold["miou"] <= 1
        assert 0.02 < fold["foreground_miou"] < 0.6
        assert {"untrained_miou", "prototype_miou", "fb_iou", "run_id", "model_version"} <= set(fold)
    mean = sum(fold["miou"] for fold in result["folds"]) / 2
    assert math.isclose(result["mean_miou"], mean, rel_tol=1e-12)
    assert Path(result["report"]).read_text().count("<img") >= 6
    assert "MSHNet" in first.stderr


def test_the_tracker_holds_parent_children_curves_and_versions(job: Job, first: Outcome) -> None:
    from mlflow import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{job.root}/mlflow.db")
    parent = client.get_run(first.result["parent_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["mean/miou"] == pytest.approx(first.result["mean_miou"])
    assert parent.data.params["training.learning_rate"] == "0.02"
    for fold in first.result["folds"]:
        child = client.get_run(fold["run_id"])
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.metrics["test/miou"] == pytest.approx(fold["miou"])
        losses = client.get_metric_history(fold["run_id"], "train/loss")
        assert [point.step for point in losses] == [1, 2]
        version = client.get_model_version_by_alias(first.result["registered_model"], f"fold{fold['fold']}")
        assert str(version.version) == fold["model_version"]


def test_a_run_held_against_its_baseline(job: Job, first: Outcome) -> None:
    """By its file and by its id in the tracker: the job's own numbers, and the same test of their difference."""
    result = first.result
    outcome = run(
        ["-m", "pipelines.compare", result["result"], "--baseline", "foreground", "--samples", "500"], job.root
    )
    assert outcome.code == 0, outcome.stderr[-3000:]
    found = outcome.result
    assert found["miou"]["a"] == pytest.approx(result["mean_miou"], rel=1e-12)
    assert found["miou"]["b"] == pytest.approx(sum(f["foreground_miou"] for f in result["folds"]) / 2, rel=1e-12)
    assert found["episodes"] == 40
    assert found["miou"]["low"] <= found["miou"]["difference"] <= found["miou"]["high"]
    tracked = Side(read_run(result["parent_run_id"], f"sqlite:///{job.root}/mlflow.db"), "trained")
    against = Side(tracked.run, "foreground")
    by_id = compared(tracked, against, shot=1, folds=(), unit="episodes", samples=500, seed=0).to_json()
    assert (by_id["miou"], by_id["folds"]) == (found["miou"], found["folds"])


def test_submitting_again_does_nothing_anew(job: Job, first: Outcome) -> None:
    models = {path: path.stat().st_mtime_ns for path in job.root.glob("store/folds/*/model/*")}
    assert len(models) == 4
    again = job.submit()
    assert again.code == 0, again.stderr[-3000:]
    assert again.result == first.result
    assert {path: path.stat().st_mtime_ns for path in job.root.glob("store/folds/*/model/*")} == models
    assert _statuses(job, first) == {"FINISHED"}
    assert job.submit("--dry-run").result == {"done": ["report"], "run": []}


def _statuses(job: Job, outcome: Outcome) -> set[str]:
    from mlflow import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{job.root}/mlflow.db")
    run_ids = [outcome.result["parent_run_id"], *(fold["run_id"] for fold in outcome.result["folds"])]
    return {client.get_run(run_id).info.status for run_id in run_ids}


def test_another_evaluation_trains_nothing_again(job: Job, first: Outcome) -> None:
    planned = job.submit("--dry-run", "--evaluation-episodes", "30")
    assert {"draw test episodes of fold 0", "evaluate fold 0", "register fold 2"} <= set(planned.result["run"])
    assert {"train fold 0", "train fold 2", "seal the store"} <= set(planned.result["done"])


def test_what_was_lost_is_made_again_and_nothing_else(job: Job, first: Outcome) -> None:
    lost, *kept = sorted(job.root.glob("store/images/*/images-*.arrow"))
    content, times = lost.read_bytes(), [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2
    lost.unlink()
    outcome = run(["-m", "pipelines.preprocess", *job.flags], job.root)
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert lost.read_bytes() == content
    assert [path.stat().st_mtime_ns for path in kept] == times
    (weights,) = job.root.glob("store/folds/pascal-fold2-*/model/model.safetensors")
    weights.rename(weights.with_suffix(".away"))
    planned = run(["-m", "pipelines.train", *job.flags, "--dry-run"], job.root)
    weights.with_suffix(".away").rename(weights)
    assert planned.result["run"] == ["train fold 2"]


def test_a_moved_store_is_still_done(job: Job, first: Outcome, tmp_path: Path) -> None:
    shutil.copytree(job.root / "store", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "evaluations")
    outcome = run(["-m", "pipelines.evaluate", *job.flags, "--store", str(tmp_path / "moved")], job.root)
    assert outcome.code == 0, outcome.stderr[-3000:]
    for fold, evaluated in zip(first.result["folds"], outcome.result, strict=True):
        assert evaluated["score"]["miou"] == fold["miou"]
    assert len(list(tmp_path.glob("moved/evaluations/*/result.json"))) == 2
    assert len(list(tmp_path.glob("moved/folds/*"))) == 2


def test_a_registered_model_loads_and_segments(job: Job, first: Outcome) -> None:
    import torch

    from mshnet.checkpoint import load_model

    (folder,) = job.root.glob("store/folds/pascal-fold0-*/model")
    model = load_model(str(folder))
    logits = model(torch.zeros(1, 3, 65, 65), torch.zeros(1, 1, 3, 65, 65), torch.ones(1, 1, 65, 65)).logits
    assert logits.shape == (1, 2, 65, 65)
    assert torch.isfinite(logits).all()


def test_two_workers_share_the_global_batch(job: Job, first: Outcome, tmp_path: Path) -> None:
    # A store of its own: their number is in no fingerprint, so that one worker's fold would be found.
    shutil.copytree(job.root / "store", tmp_path / "store", ignore=shutil.ignore_patterns("folds", "evaluations"))
    flags = [*job.flags, "--folds", "0", "--epochs", "1", "--workers", "2", "--store", str(tmp_path / "store")]
    outcome = run(["-m", "pipelines.train", *flags], tmp_path)
    assert outcome.code == 0, outcome.stderr[-3000:]
    (shared,) = outcome.result["history"]
    (of_one_worker,) = job.root.glob("store/folds/pascal-fold0-*/result.json")
    alone = json.loads(of_one_worker.read_text())["history"][0]
    assert outcome.result["train_episodes"] == 24
    assert shared["step"] == alone["step"] == 3
    for loss in ("loss", "outer_loss", "inner_loss"):
        assert shared[loss] == pytest.approx(alone[loss], rel=tolerances.SAME_TRAINING.bound)
