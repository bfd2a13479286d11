"""What a fold's registration and the aggregate record, in a real tracker; the registry itself is tested with it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import drawn as drawn_records
from pipelines import run_metrics, run_pages
from pipelines.conditions import Conditions
from pipelines.drawn import DrawnTest, DrawnTraining
from pipelines.paper_numbers import paper_row
from pipelines.register import SameRun, _params
from pipelines.results import CHOSEN_ON_TEST, CrossValidation, FoldResult
from pipelines.tracking import Tracker
from tests.pipelines.recorded_example import (
    DATA,
    configuration,
    fold_result,
    protocol,
    record_fold,
    record_job,
)

STARTS_S = 120


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Two jobs of two folds, one of them 5-shot, in one tracker."""

    client: Any
    experiment: str
    one_shot: CrossValidation
    five_shot: CrossValidation

    def found(self, query: str) -> set[str]:
        return {run.info.run_id for run in self.client.search_runs([self.experiment], query)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> Recorded:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "mlflow.db").write_bytes(empty_database)
    config = configuration(folder, f"sqlite:///{folder / 'mlflow.db'}", folds=(0, 1))
    one = record_job(config, "one", (0.652, 0.704))
    five = record_job(dataclasses.replace(config, shot=5), "five", (0.7, 0.72))
    tracker = Tracker(config.tracking_uri, config.experiment)
    return Recorded(tracker._client(), tracker._experiment_id(), one, five)


def runs_of(result: CrossValidation) -> set[str]:
    return {result.parent_run_id, *(fold.run_id for fold in result.folds)}


def test_tags_find_what_they_should(recorded: Recorded) -> None:
    one, five = recorded.one_shot, recorded.five_shot
    assert recorded.found("tags.protocol = 'published' and tags.shot = '1'") == runs_of(one)
    assert recorded.found("tags.protocol = 'published' and tags.shot = '5'") == runs_of(five)
    assert recorded.found("tags.protocol = 'balanced'") == set()
    assert recorded.found("tags.fold = '1'") == {one.folds[1].run_id, five.folds[1].run_id}
    assert recorded.found("tags.fold LIKE '%'") == {fold.run_id for fold in (*one.folds, *five.folds)}
    hashed = one.folds[0].episodes_hash
    assert recorded.found(f"tags.episodes_hash = '{hashed}'") == {one.folds[0].run_id, five.folds[0].run_id}
    assert recorded.found("metrics.`mean/miou` > 0.69") == {five.parent_run_id}
    common = (
        "tags.dataset = 'pascal' and tags.backbone = 'resnet50' and tags.similarity = 'both' and "
        "tags.architecture = 'mshnet' and tags.selection = 'base' and tags.resize = 'square' and "
        "tags.ignored = 'excluded' and tags.mask_mode = 'class label map, 255 ignored'"
    )
    assert recorded.found(common) == runs_of(one) | runs_of(five)


def test_the_parent_has_the_aggregate(recorded: Recorded) -> None:
    run = recorded.client.get_run(recorded.one_shot.parent_run_id)
    assert run.data.metrics == pytest.approx(
        {
            "mean/miou": 0.678, "mean/miou_low": 0.67, "mean/miou_high": 0.686,
            "mean/fb_iou": 0.775, "mean/fb_iou_low": 0.77, "mean/fb_iou_high": 0.78,
            "mean/miou_minus_paper": 0.678 - (0.677 + 0.718) / 2,
            "mean/baseline_untrained_miou": 0.126, "mean/baseline_foreground_miou": 0.191,
            "mean/baseline_prototype_miou": 0.231,
            "fold0/miou": 0.652, "fold0/miou_low": 0.638, "fold0/miou_high": 0.665,
            "fold1/miou": 0.704, "fold1/miou_low": 0.69, "fold1/miou_high": 0.717,
        },
        abs=1e-6,
    )  # fmt: skip
    note = run.data.tags["mlflow.note.content"]
    lines = [line.replace("\u00a0", "") for line in note.splitlines()]
    assert lines[0].startswith("mean mIoU 67.8 % (67.0 to 68.6), FB-IoU 77.5 % (77.0 to 78.0): pascal, resnet50")
    assert "| MSHNet, trained | 65.2 | 70.4 | 67.8 | 77.5 |" in lines
    assert r"| 95 % interval | \[63.8, 66.5\] | \[69.0, 71.7\] | \[67.0, 68.6\] | \[77.0, 78.0\] |" in lines
    for fold in recorded.one_shot.folds:
        assert f"](#/experiments/{recorded.experiment}/runs/{fold.run_id})" in note
        assert f"](#/models/mshnet-pascal-resnet50-1shot/versions/{fold.model_version})" in note
    assert f"[champion: version {recorded.one_shot.folds[1].model_version}](#/models/" in note
    assert f"/runs/{recorded.one_shot.parent_run_id}/artifacts/report/report.html)" in note
    read = json.loads(artifact(recorded, run.info.run_id, "cross_validation.json"))
    assert CrossValidation.from_json(read) == recorded.one_shot


def artifact(recorded: Recorded, run_id: str, path: str) -> bytes:
    return Path(recorded.client.download_artifacts(run_id, path)).read_bytes()


def test_a_fold_s_run_has_its_numbers_and_files(recorded: Recorded) -> None:
    fold = recorded.one_shot.folds[0]
    run = recorded.client.get_run(fold.run_id)
    assert run.data.tags["mlflow.parentRunId"] == recorded.one_shot.parent_run_id
    assert run.data.tags["protocol.label"] == fold.protocol.label
    assert run.data.params["drawn.protocol.resize"] == "square"
    assert run.data.metrics["test/miou_low"] == pytest.approx(0.638)
    assert len(recorded.client.get_metric_history(fold.run_id, "train/loss")) == 12
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("pascal fold 0", fold.episodes_hash)

    root = Path(recorded.client.download_artifacts(fold.run_id, ""))
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == [
        "fold.json",
        "model_card.md",
        "outcomes.arrow",
        "pictures/charts/classes.png",
        "pictures/charts/curves.png",
        "pictures/energy/energy-0.png",
        "pictures/failures/false-foreground-3.png",
        "pictures/failures/missed-small-object-4.png",
        "pictures/failures/worst-2.png",
        "pictures/panels/best-0.png",
        "pictures/panels/median-1.png",
        "protocol.json",
    ]
    assert FoldResult.from_json((root / "fold.json").read_bytes()) == fold
    conditions = Conditions.from_json((root / "protocol.json").read_bytes())
    assert (conditions.protocol, conditions.data_fingerprint) == (fold.protocol, DATA)

    note = run.data.tags["mlflow.note.content"].replace("\u00a0", "")
    assert note.startswith("mIoU 65.2 % (63.8 to 66.5), FB-IoU 77.0 %")
    assert r"| aeroplane | 73.2 | \[70.2, 76.2\] |" in note
    assert "| small objects | 45.2 | 210 episodes |" in note
    assert "| trained, judged with 5 supports | 69.2 |" in note
    assert f"version {fold.model_version}](#/models/" in note


def test_a_version_leads_back(recorded: Recorded) -> None:
    fold, client = recorded.five_shot.folds[1], recorded.client
    version = client.get_model_version("mshnet-pascal-resnet50-5shot", fold.model_version)
    assert version.run_id == fold.run_id
    assert sorted(version.aliases) == ["champion", "fold1"], "of both folds it leads prototype matching by most"
    assert {key: version.tags[key] for key in ("fold", "miou", "miou_low", "miou_high", "protocol", "selection")} == {
        "fold": "1", "miou": "0.72", "miou_low": "0.7060", "miou_high": "0.7330",
        "protocol": "published", "selection": "base",
    }  # fmt: skip
    text = version.description.replace("\u00a0", "")
    assert len(text.splitlines()[0]) < 120
    for expected in (
        "mIoU 72.0 % (70.6 to 73.3), FB-IoU 78.0 % (77.1 to 78.9): pascal fold 1, 5-shot",
        f"[run](#/experiments/{recorded.experiment}/runs/{fold.run_id})",
        f"/runs/{recorded.five_shot.parent_run_id}/artifacts/report/report.html)",
        "| prototype matching, no training | 23.6 |",
        "| paper, table 2 | 74.1 |",
        "| test episodes | published: published draw, 1000 episodes, 5-shot, square 473 px |",
        f"| episodes hash | {fold.episodes_hash} |",
        f"| data | pascal, fingerprint {DATA[:12]} |",
        "| epoch chosen | best epoch on held-out base classes (car, cat) |",
        f"| commit | {fold.git_commit} |",
        "| split lists | lists:4f2c1a9be07d |",
        "models:/mshnet-pascal-resnet50-5shot@fold1",
    ):
        assert expected in text
    model = client.get_registered_model("mshnet-pascal-resnet50-5shot")
    assert "`fold0`, `fold1`, `fold2`, `fold3`: of each fold the version with the highest mIoU" in model.description
    assert "models:/mshnet-pascal-resnet50-5shot@champion" in model.description


@pytest.fixture
def server(tmp_path: Path, empty_database: bytes) -> Iterator[str]:
    """A tracking server of its own, which also takes the artifacts."""
    (tmp_path / "server.db").write_bytes(empty_database)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"),
        *("--artifacts-destination", str(tmp_path / "served")),
    ]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + STARTS_S
        while not answers(address):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_server_takes_it_all(server: str, tmp_path: Path) -> None:
    config = configuration(tmp_path, server, folds=(0,))
    result = record_job(config, "job", (0.652,))
    client = Tracker(server, config.experiment)._client()
    fold = result.folds[0]
    found = client.search_runs(["1"], "tags.protocol = 'published' and tags.shot = '1'")
    assert {run.info.run_id for run in found} == runs_of(result)
    note = client.get_run(fold.run_id).data.tags["mlflow.note.content"]
    (address,) = re.findall(r"\[report\]\(#/experiments/1/runs/(\w+)/artifacts/report/report.html\)", note)
    listed = client.list_artifacts(address, "report")
    assert [file.path for file in listed] == ["report/report.html"]
    pictures = {file.path for file in client.list_artifacts(fold.run_id, "pictures")}
    assert pictures == {f"pictures/{kind}" for kind in ("charts", "energy", "failures", "panels")}
    assert client.get_model_version_by_alias(config.model_name, "fold0").run_id == fold.run_id


def test_a_result_counts_only_for_the_run_that_it_was_logged_to() -> None:
    result = {"run_id": "a1", "parent_run_id": "p1"}
    assert SameRun("run_id", "a1")(result)
    assert not SameRun("run_id", "b2")(result)
    assert SameRun("parent_run_id", "p1")(result)
    assert not SameRun("parent_run_id", "a1")(result)
    # A dry run starts none.
    assert SameRun("run_id", "")(result)


def test_a_score_on_the_episodes_that_chose_the_epoch_has_names_of_its_own(
    tmp_path: Path, empty_database: bytes
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    config = configuration(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", folds=(0,))
    chosen = fold_result(config, 0, 0.652, protocol=protocol(config, selection=CHOSEN_ON_TEST))
    run_id = Tracker(config.tracking_uri, config.experiment).start_parent("fold 0", {}, {}, "key")
    record_fold(config, run_id, chosen)
    run = Tracker(config.tracking_uri, config.experiment)._client().get_run(run_id)
    metrics = run.data.metrics
    assert metrics["test_epoch_chosen_on_test/miou"] == pytest.approx(0.652)
    assert metrics["test_epoch_chosen_on_test/miou_minus_paper"] == pytest.approx(-0.025)
    assert not [name for name in metrics if re.match(r"test(_by_\w+)?/|class_iou/", name)]
    assert "epoch chosen on the test episodes" in run.data.tags["mlflow.note.content"]


def test_the_metrics_are_the_fold_s_numbers(tmp_path: Path) -> None:
    config = configuration(tmp_path, "sqlite:///unused.db")
    fold = fold_result(config, 1, 0.704)
    metrics = run_metrics.of_fold(fold, paper_row("pascal", "resnet50", "both", 1))
    classes = {name.removeprefix("class_iou/"): v for name, v in metrics.items() if name.startswith("class_iou/")}
    assert classes == fold.score.class_iou
    others = {name: value for name, value in metrics.items() if not name.startswith(("class_iou/", "baseline_"))}
    assert others == pytest.approx(
        {
            "test/miou": 0.704, "test/miou_low": 0.69, "test/miou_high": 0.717,
            "test/fb_iou": 0.78, "test/fb_iou_low": 0.771, "test/fb_iou_high": 0.789,
            "test/miou_minus_paper": -0.014,
            "test_by_size/small": 0.504, "test_by_size/medium": 0.684, "test_by_size/large": 0.784,
            "test_by_shots/5": 0.744,
            "features/reused": 0.75, "features/computed": 500,
            "best_epoch": 9, "train_s": 5400, "evaluate_s": 61.5,
        }
    )  # fmt: skip
    baseline = {name: value for name, value in metrics.items() if name.startswith("baseline_prototype/")}
    assert baseline == pytest.approx(
        {
            "baseline_prototype/miou": 0.236, "baseline_prototype/miou_low": 0.222,
            "baseline_prototype/miou_high": 0.249, "baseline_prototype/fb_iou": 0.45,
            "baseline_prototype/fb_iou_low": 0.441, "baseline_prototype/fb_iou_high": 0.459,
        }
    )  # fmt: skip


def test_seeds_stand_beside_each_other(tmp_path: Path) -> None:
    config = configuration(tmp_path, "sqlite:///unused.db")
    fold = fold_result(config, 0, 0.65, protocol=protocol(config, seeds=(0, 3)))
    fold = dataclasses.replace(fold, score=dataclasses.replace(fold.score, by_seed=(0.64, 0.66)))
    metrics = run_metrics.of_fold(fold, None)
    assert {name: value for name, value in metrics.items() if "seed" in name} == {
        "test_by_seed/0": 0.64,
        "test_by_seed/3": 0.66,
    }
    assert "test/miou_minus_paper" not in metrics


def test_a_fold_without_a_baseline_is_an_error_not_a_gap(tmp_path: Path) -> None:
    fold = dataclasses.replace(fold_result(configuration(tmp_path, "sqlite:///unused.db"), 0, 0.65), baselines={})
    with pytest.raises(KeyError, match="untrained"):
        run_metrics.of_fold(fold, None)


def test_names_that_hold_marks_stay_names(tmp_path: Path) -> None:
    config = configuration(tmp_path, "sqlite:///unused.db")
    fold = fold_result(config, 0, 0.65, protocol=protocol(config, mask_mode="[x](javascript:alert(1)) | <b>"))
    conditions = Conditions(protocol=fold.protocol, episodes_hash="e", data_fingerprint="f")
    page = run_pages.FoldPage(config=config, result=fold, conditions=conditions, links={})
    for text in (page.of_run(), page.of_version()):
        assert r"\[x\](javascript:alert(1)) \| \<b\>" in text


def test_the_parameters_say_what_was_drawn_but_not_where_it_lies(tmp_path: Path) -> None:
    training = DrawnTraining(
        fold=0, folder="episodes/a", store="images/b", split_lists="rule: at least 30 px", selection="last epoch",
        base_classes=(5, 6), left_out=(), training_pairs=74, removed_pairs=43,
        pairs_sha256="a" * 64, validation_sha256="b" * 64,
    )  # fmt: skip
    judged = protocol(configuration(tmp_path, "sqlite:///unused.db"))
    test = DrawnTest(
        fold=0, folder="episodes/c", store="images/b", protocol=judged, novel_classes=(0, 1),
        tests=[drawn_records.TestList(shot=1, seed=0, split="test", episodes_hash="e68ad4a7d8d5")],
        left_out=("disc",), test_pairs=20, episodes_hash="e68ad4a7d8d5", episodes_sha256="c" * 64,
    )  # fmt: skip
    assert _params(training) == {
        "split_lists": "rule: at least 30 px",
        "selection": "last epoch",
        "base_classes": [5, 6],
        "training_pairs": 74,
        "removed_pairs": 43,
        "pairs_sha256": "a" * 64,
        "validation_sha256": "b" * 64,
    }
    assert _params(test) == {
        "protocol": {**dataclasses.asdict(judged), "seeds": [0]},
        "tests": [{"shot": 1, "seed": 0, "split": "test", "episodes_hash": "e68ad4a7d8d5"}],
        "novel_classes": [0, 1], "test_pairs": 20, "episodes_hash": "e68ad4a7d8d5", "episodes_sha256": "c" * 64,
    }  # fmt: skip
