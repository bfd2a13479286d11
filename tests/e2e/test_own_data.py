"""A COCO JSON of one's own, seven classes in three folds: from two flags to registered models and a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from mshnet.data.shapes import class_names
from mshnet.data.shapes_own import write_coco_json
from pipelines.results import CrossValidation
from tests.e2e.conftest import Outcome, cross_validate, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
CLASSES = 7
SMALL = shlex.split(
    "--image-size-px 33 --min-object-px 60 --backbone resnet18 --backbone-weights random --epochs 1 "
    "--episodes-per-epoch 8 --learning-rate 0.02 --validation-episodes 4 --evaluation-episodes 14 "
    "--threshold-episodes 6 --panels-each 1 --bootstrap-samples 50 --feature-cache-gib 1"
)


class Job:
    """One store and tracker for the tests of this file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tracker = f"sqlite:///{root}/mlflow.db"
        write_coco_json(root / "parts list", images=70, size_px=64, classes=CLASSES)
        self.flags = [
            *("--dataset", "coco-json", "--images", "parts list/images"),
            *("--annotations", "parts list/annotations.json", "--fold-count", "3", "--data-name", "parts"),
            *("--store", "store", "--tracking-uri", self.tracker, *SMALL),
        ]

    def submit(self, *more: str) -> Outcome:
        return run(cross_validate(*self.flags, *more), self.root)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def done(job: Job) -> Outcome:
    outcome = job.submit()
    assert outcome.code == 0, outcome.stderr[-3000:]
    return outcome


def test_every_class_is_tested_in_one_fold_and_its_model_is_registered(job: Job, done: Outcome) -> None:
    from mlflow import MlflowClient

    result = done.result
    assert result["registered_model"] == "mshnet-parts-resnet18-1shot"
    assert [fold["fold"] for fold in result["folds"]] == [0, 1, 2]
    client: Any = MlflowClient(job.tracker)
    for fold in result["folds"]:
        version = client.get_model_version_by_alias("mshnet-parts-resnet18-1shot", f"fold{fold['fold']}")
        assert str(version.version) == fold["model_version"]
    report = CrossValidation.from_json(Path(result["result"]).read_bytes())
    tested = [name for fold in report.folds for name in fold.novel_classes]
    assert sorted(tested) == sorted(class_names("voc")[:CLASSES])
    assert {fold.protocol.split_lists for fold in report.folds} == {
        "rule: at least 60 px; 3 folds by frequency, seed 0"
    }
    assert all(set(fold.score.class_iou) == set(fold.novel_classes) for fold in report.folds)
    assert report.miou_interval is not None
    parent = client.get_run(result["parent_run_id"])
    assert (parent.data.tags["dataset"], parent.data.tags["data_name"]) == ("coco-json", "parts")
    assert parent.info.run_name == "parts 1-shot resnet18 both"


def test_what_a_person_reads_names_the_data_and_not_the_paper(done: Outcome) -> None:
    assert "parts, resnet18, both similarities, 1-shot, 33 px, 3 of 3 folds" in done.stderr
    assert "paper" not in done.stderr
    page = Path(done.result["report"]).read_text()
    assert "no row for coco-json" not in page


def test_the_run_is_held_against_its_baseline_class_by_class(job: Job, done: Outcome) -> None:
    outcome = run(
        ["-m", "pipelines.compare", done.result["result"], "--baseline", "foreground", "--samples", "100"], job.root
    )
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert outcome.result["miou"]["a"] == pytest.approx(done.result["mean_miou"], rel=1e-12)
    named = {name for fold in outcome.result["folds"] for name in fold["class_iou"]}
    assert named == set(class_names("voc")[:CLASSES])


def test_other_folds_train_anew_on_the_same_images(job: Job, done: Outcome) -> None:
    assert job.submit("--dry-run").result == {"done": ["report"], "run": []}
    others = job.submit("--dry-run", "--fold-seed", "1").result
    assert "train fold 0" in others["run"]
    assert "seal the store" in others["done"]
