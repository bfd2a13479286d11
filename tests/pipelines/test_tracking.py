from __future__ import annotations

import json
import multiprocessing
import pickle
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import urlparse

import pytest

from mshnet.errors import InputError
from pipelines.results import EpochRecord
from pipelines.tracking import KEY_TAG, RESUBMITTED_TAG, Tracker, flattened


def epoch(number: int, validation_miou: float | None = None) -> EpochRecord:
    return EpochRecord(
        epoch=number,
        step=10 * number,
        loss=1.0 / number,
        outer_loss=0.5 / number,
        inner_loss=0.25,
        learning_rate=0.01,
        episodes_per_s=40.0,
        validation_miou=validation_miou,
    )


@pytest.fixture
def tracker(tmp_path: Path, empty_database: bytes) -> Tracker:
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    return Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "mshnet-shapes")


def test_a_parent_has_its_children_their_curves_and_their_config(tracker: Tracker) -> None:
    parent = tracker.start_parent("cv", {"train": {"lr": 0.01}}, {"git": "abc"}, "cv-key")
    child = tracker.start_child(parent, "fold 0", {"fold": 0}, {}, "fold-key")
    for number in (1, 2, 3):
        tracker.log_epoch(child, epoch(number, validation_miou=0.1 * number if number > 1 else None))
    tracker.log_metrics(child, {"class_iou/potted plant": 0.25, "novel/miou (top)": 0.5}, step=3)
    tracker.finish(child)
    tracker.finish(parent, "FAILED")

    client = tracker._client()
    run = client.get_run(child)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert (run.info.run_name, run.info.status, client.get_run(parent).info.status) == (
        "fold 0",
        "FINISHED",
        "FAILED",
    )
    points = client.get_metric_history(child, "train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    validated = client.get_metric_history(child, "validation/miou")
    assert [(point.step, point.value) for point in validated] == [(2, 0.2), (3, pytest.approx(0.3))]
    assert run.data.metrics["class_iou/potted plant"] == 0.25
    assert run.data.metrics["novel/miou _top_"] == 0.5
    assert client.get_run(parent).data.params == {"train.lr": "0.01"}
    assert client.get_run(parent).data.tags["git"] == "abc"


def test_a_resubmitted_job_reopens_its_runs(tracker: Tracker) -> None:
    parent = tracker.start_parent("cv", {"workers": 1}, {}, "cv-key")
    child = tracker.start_child(parent, "fold 0", {}, {}, "fold-key")
    tracker.finish(child, "FAILED")
    tracker.finish(parent, "FAILED")

    again = Tracker(tracker.tracking_uri, tracker.experiment)
    assert again.start_parent("cv", {"workers": 4, "new": "x"}, {"try": "2"}, "cv-key") == parent
    assert again.start_child(parent, "fold 0", {}, {}, "fold-key") == child
    run = again._client().get_run(parent)
    assert (run.info.status, run.data.tags["try"], run.data.tags[KEY_TAG]) == ("RUNNING", "2", "cv-key")
    assert run.data.params == {"workers": "1", "new": "x"}
    assert json.loads(run.data.tags[RESUBMITTED_TAG]) == {"workers": "4"}

    other = again.start_parent("cv", {}, {}, "other-key")
    assert other != parent
    assert again.start_child(other, "fold 0", {}, {}, "fold-key") != child, "a child belongs to its parent"


def test_a_run_says_what_it_worked_on_and_where_it_is(tracker: Tracker) -> None:
    parent = tracker.start_parent("cv", {}, {}, "cv-key")
    child = tracker.start_child(parent, "fold 0", {}, {}, "fold-key")
    tracker.describe(child, "**mIoU** 65.2 %")
    tracker.describe(parent, "line\n" * 2000)
    tracker.log_dataset(child, "pascal fold 0", "e68ad4a7d8d5", "test", "data/VOC2012")

    client = tracker._client()
    found = client.get_run(child)
    assert found.data.tags["mlflow.note.content"] == "**mIoU** 65.2 %"
    long = client.get_run(parent).data.tags["mlflow.note.content"]
    assert long.splitlines()[-2:] == ["", "(cut: too long for the tracker)"]
    assert set(long.splitlines()[:-2]) == {"line"}
    assert 4950 < len(long) <= 5000
    (used,) = found.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("pascal fold 0", "e68ad4a7d8d5")
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "test")]
    by_digest = client.search_runs([found.info.experiment_id], "dataset.digest = 'e68ad4a7d8d5'")
    assert [run.info.run_id for run in by_digest] == [child]
    assert (tracker.parent(child), tracker.parent(parent)) == (parent, "")
    assert tracker.page(child) == f"#/experiments/{found.info.experiment_id}/runs/{child}"
    assert tracker.page(parent, "report/report.html").endswith(f"/runs/{parent}/artifacts/report/report.html")


def test_an_experiment_has_its_views_once(tracker: Tracker) -> None:
    client, experiment_id = tracker._client(), tracker._experiment_id()
    tags = client.get_experiment(experiment_id).tags
    assert f"#/experiments/{experiment_id}/runs?viewStateShareKey=folds" in tags["mlflow.note.content"]
    view = json.loads(tags["mlflow.sharedViewState.folds"])
    state = json.loads(view["state"])
    assert (view["name"], state["searchFilter"]) == ("Folds", "tags.fold LIKE '%'")
    assert state["selectedColumns"][0] == "metrics.`test/miou`"
    assert "tags.`shot`" in state["selectedColumns"]

    client.set_experiment_tag(experiment_id, "mlflow.note.content", "by hand")
    client.delete_experiment_tag(experiment_id, "mlflow.sharedViewState.folds")
    assert tracker._experiment_id() == experiment_id
    tags = client.get_experiment(experiment_id).tags
    assert tags["mlflow.note.content"] == "by hand"
    assert "mlflow.sharedViewState.folds" not in tags


def test_an_experiment_from_before_the_views_gets_them(tracker: Tracker) -> None:
    client = tracker._client()
    made = client.create_experiment(tracker.experiment, tags={"mlflow.note.content": "by hand"})
    assert tracker._experiment_id() == made
    tags = client.get_experiment(made).tags
    assert tags["mlflow.note.content"] == "by hand"
    assert "mlflow.sharedViewState.folds" in tags


def test_artifacts_lie_beside_the_database(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.start_parent("cv", {}, {}, "key")
    (tmp_path / "curve.txt").write_text("curve")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.txt").write_text("a")
    tracker.log_file(run, tmp_path / "curve.txt", "plots")
    tracker.log_file(run, tmp_path / "pictures", "panels")
    tracker.log_bytes(run, b"\x89PNG", "panels/fold0/best.png")
    tracker.log_bytes(run, b"{}", "result.json")
    root = tmp_path / "mlartifacts" / run / "artifacts"
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert found == {
        "plots/curve.txt": b"curve",
        "panels/a.txt": b"a",
        "panels/fold0/best.png": b"\x89PNG",
        "result.json": b"{}",
    }
    assert {file.path for file in tracker._client().list_artifacts(run, "panels")} == {
        "panels/a.txt",
        "panels/fold0",
    }


def test_a_tracker_is_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker("sqlite:///mlflow.db", "e")
    assert tracker.tracking_uri == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(tracker)) == tracker


def test_a_config_is_flattened_for_mlflow() -> None:
    flat = flattened({"train": {"lr": 0.01, "folds": [0, 1], "none": None}, "a@b": "x" * 600, "empty": {}, "on": True})
    assert flat.pop("a_b") == "x" * 499 + "…"
    assert flat == {
        "train.lr": "0.01",
        "train.folds": "[0, 1]",
        "train.none": "null",
        "empty": "{}",
        "on": "true",
    }


def test_more_params_than_one_request_takes(tracker: Tracker) -> None:
    run = tracker.start_parent("cv", {f"p{i}": i for i in range(230)}, {}, "key")
    params = tracker._client().get_run(run).data.params
    assert (len(params), params["p229"]) == (230, "229")


def log_a_fold(tracker: Tracker, parent: str, fold: int) -> str:
    run = tracker.start_child(parent, f"fold {fold}", {"fold": fold}, {}, f"key-{fold}")
    for number in range(1, 16):
        tracker.log_epoch(run, epoch(number, 0.01 * number))
    tracker.log_bytes(run, bytes([fold]), "panels/fold.bin")
    tracker.finish(run)
    return run


def start_in_a_new_database(uri: str) -> str:
    return Tracker(uri, "raced")._experiment_id()


def test_four_processes_log_at_once_into_a_new_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=spawn) as pool:
        assert len(set(pool.map(start_in_a_new_database, [uri] * 4))) == 1
        tracker = Tracker(uri, "raced")
        parent = tracker.start_parent("cv", {}, {}, "key")
        runs = list(pool.map(log_a_fold, [tracker] * 4, [parent] * 4, range(4)))
    client = tracker._client()
    for fold, run_id in enumerate(runs):
        points = client.get_metric_history(run_id, "train/loss")
        assert [point.value for point in sorted(points, key=lambda point: point.step)] == [1 / n for n in range(1, 16)]
        folder = Path(urlparse(client.get_run(run_id).info.artifact_uri).path)
        assert (folder / "panels/fold.bin").read_bytes() == bytes([fold])
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from experiments where name = 'raced'").fetchone() == (1,)


def test_bad_use_is_refused(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.start_parent("cv", {}, {}, "key")
    with pytest.raises(InputError, match="status must be one of FINISHED, FAILED, KILLED, got 'DONE'"):
        tracker.finish(run, "DONE")
    with pytest.raises(InputError, match="no file to log"):
        tracker.log_file(run, tmp_path / "absent.txt")
    with pytest.raises(InputError, match="ends in a file name"):
        tracker.log_bytes(run, b"", "folder/")
    with pytest.raises(InputError, match="without quotes"):
        tracker.start_parent("cv", {}, {}, "it's")
    with pytest.raises(InputError, match="needs a name"):
        Tracker(tracker.tracking_uri, " ")


def test_a_deleted_experiment_is_named(tracker: Tracker) -> None:
    client = tracker._client()
    client.delete_experiment(tracker._experiment_id())
    with pytest.raises(InputError, match=r"'mshnet-shapes' was deleted: restore it"):
        tracker.start_parent("cv", {}, {}, "key")
