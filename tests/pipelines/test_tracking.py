from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from mshnet.errors import InputError
from pipelines.results import EpochRecord
from pipelines.tracking import KEY_TAG, RESUBMITTED_TAG, Tracker, flattened

PROTOCOL = "published 1000"


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


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A migrated, empty MLflow database: making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracker(f"sqlite:///{path}", "warm-up")._client().search_experiments()
    return path.read_bytes()


@pytest.fixture
def tracker(tmp_path: Path, empty_database: bytes) -> Tracker:
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    return Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "mshnet-shapes")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"weight": np.arange(4, dtype=np.float32)}, str(path))
    return path


def register(tracker: Tracker, run_id: str, weights: Path, score: float, **changes: Any) -> str:
    values: dict[str, Any] = {
        "model_name": "mshnet-shapes-1shot",
        "config": {"model": {"backbone": "resnet18"}, "image_size_px": 65},
        "protocol": PROTOCOL,
        "fold": 0,
        "description": "fold 0",
        "data_fingerprint": "f" * 64,
    }
    return tracker.register(run_id=run_id, weights_path=weights, score=score, **(values | changes))


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


def test_a_version_tells_where_it_comes_from(
    tracker: Tracker, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = tracker.start_parent("cv", {}, {}, "key")
    assert register(tracker, run, weights, 0.512) == "1"
    client = tracker._client()
    version = client.get_model_version("mshnet-shapes-1shot", "1")
    assert {key: version.tags[key] for key in ("fold", "protocol", "miou", "run_id", "data_fingerprint")} == {
        "fold": "0",
        "protocol": PROTOCOL,
        "miou": "0.512",
        "run_id": run,
        "data_fingerprint": "f" * 64,
    }
    assert (version.run_id, version.description, version.status) == (run, "fold 0", "READY")
    (output,) = client.get_run(run).outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (version.source, logged.status) == (logged.artifact_location, "READY")

    folder = Path(urlparse(logged.artifact_location).path)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "MLmodel",
        "artifacts/model/model.safetensors",
        "served_model.py",
        "code/mshnet/model.py",
    } <= files
    assert not [name for name in files if name.endswith((".pkl", ".pyc", ".pt", ".pth"))]
    assert (folder / "artifacts/model/model.safetensors").read_bytes() == weights.read_bytes()
    assert json.loads((folder / "artifacts/model/config.json").read_text())["image_size_px"] == 65
    assert list(elsewhere.iterdir()) == [], "nothing goes to MLflow's default store in the working folder"


def test_the_same_weights_are_registered_once(tracker: Tracker, weights: Path) -> None:
    run = tracker.start_parent("cv", {}, {}, "key")
    assert register(tracker, run, weights, 0.5) == register(tracker, run, weights, 0.5) == "1"
    weights.write_bytes(weights.read_bytes() + b"trained again")
    assert register(tracker, run, weights, 0.6) == "2"


def test_an_alias_moves_only_to_a_better_version_of_the_same_protocol(
    tracker: Tracker, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def version(key: str, score: float, protocol: str = PROTOCOL) -> tuple[str, bool]:
        run = tracker.start_parent(key, {}, {}, key)
        number = register(tracker, run, weights, score, protocol=protocol)
        return number, tracker.promote("mshnet-shapes-1shot", number, protocol, score, "fold0")

    def holder() -> str:
        return str(tracker._client().get_model_version_by_alias("mshnet-shapes-1shot", "fold0").version)

    assert version("first", 0.50) == ("1", True)
    assert version("worse", 0.49) == ("2", False)
    assert version("equal", 0.50) == ("3", False)
    assert holder() == "1"
    assert version("better", 0.51) == ("4", True)
    assert holder() == "4"
    with caplog.at_level(logging.WARNING):
        assert version("another protocol", 0.99, protocol="every validation pair") == ("5", False)
    assert "cannot be compared" in caplog.text
    assert version("not a number", float("nan")) == ("6", False)
    assert holder() == "4"
    assert tracker.promote("mshnet-shapes-1shot", "4", PROTOCOL, 0.51, "fold0"), "it is already there"
    assert tracker.promote("mshnet-shapes-1shot", "2", PROTOCOL, 0.49, "fold1"), "aliases are independent"


def test_bad_use_is_refused(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.start_parent("cv", {}, {}, "key")
    with pytest.raises(InputError, match="status must be one of FINISHED, FAILED, KILLED, got 'DONE'"):
        tracker.finish(run, "DONE")
    with pytest.raises(InputError, match="no file to log"):
        tracker.log_file(run, tmp_path / "absent.txt")
    with pytest.raises(InputError, match="ends in a file name"):
        tracker.log_bytes(run, b"", "folder/")
    with pytest.raises(InputError, match="no weights to register"):
        register(tracker, run, tmp_path / "absent.safetensors", 0.5)
    with pytest.raises(InputError, match="without quotes"):
        tracker.start_parent("cv", {}, {}, "it's")
    with pytest.raises(InputError, match="needs a name"):
        Tracker(tracker.tracking_uri, " ")


def test_a_deleted_experiment_is_named(tracker: Tracker) -> None:
    client = tracker._client()
    client.delete_experiment(tracker._experiment_id())
    with pytest.raises(InputError, match=r"'mshnet-shapes' was deleted: restore it"):
        tracker.start_parent("cv", {}, {}, "key")
