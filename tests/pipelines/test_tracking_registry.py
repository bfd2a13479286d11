"""Versions and aliases in a real registry."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from mshnet.errors import InputError
from pipelines.conditions import Conditions
from pipelines.tracking import Tracker
from pipelines.tracking_registry import CONDITIONS_TAG, NewVersion, Registry, version_page
from tests.pipelines import cross_validation_example

NAME = "mshnet-shapes-1shot"
PROTOCOL = dataclasses.replace(
    cross_validation_example.PROTOCOL, selection="best epoch on held-out base classes (car, cat)"
)
CONDITIONS = Conditions(protocol=PROTOCOL, episodes_hash="e68ad4a7d8d5", data_fingerprint="f" * 64)


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


def register(tracker: Tracker, run_id: str, weights: Path, miou: float, **changes: Any) -> str:
    values: dict[str, Any] = {
        "fold": 0,
        "miou": miou,
        "conditions": CONDITIONS,
        "description": "fold 0",
        "tags": {"protocol": "published"},
    }
    config = {"model": {"backbone": "resnet18"}, "image_size_px": 65}
    return Registry(tracker, NAME, "what it is").register(run_id, weights, config, NewVersion(**(values | changes)))


def test_a_version_tells_where_it_comes_from(
    tracker: Tracker, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = tracker.start_parent("cv", {}, {}, "key")
    assert register(tracker, run, weights, 0.512) == "1"
    client = tracker._client()
    version = client.get_model_version(NAME, "1")
    assert {key: value for key, value in version.tags.items() if key not in ("weights_sha256", CONDITIONS_TAG)} == {
        "fold": "0",
        "protocol": "published",
        "miou": "0.512",
        "run_id": run,
        "episodes_hash": "e68ad4a7d8d5",
        "data_fingerprint": "f" * 64,
    }
    assert Conditions.from_json(version.tags[CONDITIONS_TAG]) == CONDITIONS
    assert client.get_registered_model(NAME).description == "what it is"
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
    described = (folder / "MLmodel").read_text()
    for name in ("query", "supports", "masks"):
        assert f'"name": "{name}"' in described
    assert "input_example.json" in described
    assert set(json.loads((folder / "input_example.json").read_text())["columns"]) == {"query", "supports", "masks"}
    assert list(elsewhere.iterdir()) == [], "nothing goes to MLflow's default store in the working folder"


def test_the_same_weights_are_registered_once(tracker: Tracker, weights: Path) -> None:
    run = tracker.start_parent("cv", {}, {}, "key")
    assert register(tracker, run, weights, 0.5) == register(tracker, run, weights, 0.5) == "1"
    weights.write_bytes(weights.read_bytes() + b"trained again")
    assert register(tracker, run, weights, 0.6) == "2"


def test_a_description_by_hand_stays(tracker: Tracker, weights: Path) -> None:
    client, run = tracker._client(), tracker.start_parent("cv", {}, {}, "key")
    client.create_registered_model(NAME)
    register(tracker, run, weights, 0.5)
    assert client.get_registered_model(NAME).description == "what it is", "there was none"
    client.update_registered_model(NAME, "by hand")
    weights.write_bytes(weights.read_bytes() + b"trained again")
    register(tracker, run, weights, 0.5)
    assert client.get_registered_model(NAME).description == "by hand"


def test_an_alias_moves_only_to_a_better_version_of_the_same_conditions(
    tracker: Tracker, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(tracker, NAME)

    def version(key: str, score: float, conditions: Conditions = CONDITIONS) -> tuple[str, bool]:
        run = tracker.start_parent(key, {}, {}, key)
        number = register(tracker, run, weights, score, conditions=conditions)
        return number, registry.promote(number, "fold0")

    def holder() -> str:
        return str(tracker._client().get_model_version_by_alias(NAME, "fold0").version)

    assert version("first", 0.50) == ("1", True)
    assert version("worse", 0.49) == ("2", False)
    assert version("equal", 0.50) == ("3", False)
    assert holder() == "1"
    other_classes = dataclasses.replace(PROTOCOL, selection="best epoch on held-out base classes (dog)")
    better = dataclasses.replace(CONDITIONS, protocol=other_classes)
    assert version("better", 0.51, better) == ("4", True), "which classes are held out is no rule of measuring"
    assert holder() == "4"
    original = dataclasses.replace(CONDITIONS, protocol=dataclasses.replace(PROTOCOL, resize="original"))
    with caplog.at_level(logging.WARNING):
        assert version("another protocol", 0.99, original) == ("5", False)
    assert "cannot be compared (resize: original, not square)" in caplog.text
    assert version("not a number", float("nan")) == ("6", False)
    assert holder() == "4"
    assert registry.promote("4", "fold0"), "it is already there"
    assert registry.promote("2", "fold1"), "aliases are independent"

    tracker._client().delete_model_version_tag(NAME, "4", CONDITIONS_TAG)
    with caplog.at_level(logging.WARNING):
        assert not registry.promote("5", "fold0")
    assert "does not say under which" in caplog.text


def test_weights_that_are_not_there_are_refused(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.start_parent("cv", {}, {}, "key")
    with pytest.raises(InputError, match="no weights to register"):
        register(tracker, run, tmp_path / "absent.safetensors", 0.5)


def test_a_version_s_page() -> None:
    assert version_page("a model/b", "3") == "#/models/a%20model%2Fb/versions/3"
