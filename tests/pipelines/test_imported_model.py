"""A checkpoint of the published layout, imported and registered by the command: a version that can be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mshnet import ModelConfig, MSHNet
from mshnet.checkpoint import published_state_dict
from mshnet.commands.import_published import ORIGIN, command
from mshnet.predict import Segmenter
from pipelines.tracking_client import client


def test_the_version_says_where_it_comes_from_and_segments(
    empty_database: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)  # artifacts lie below
    torch.save(published_state_dict(MSHNet(ModelConfig(backbone="resnet18")), include_backbone=True), "fold0.pt")
    command("fold0.pt", "model", image_size_px=65, register="published-fold0")
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (made["registered_model"], made["version"]) == ("published-fold0", "1")
    version = client(uri).get_model_version("published-fold0", "1")
    assert version.tags["origin"] == ORIGIN
    assert made["source_sha256"] in version.description
    registered = Segmenter.from_registry("models:/published-fold0/1", device="cpu")
    assert registered.fingerprint == Segmenter.from_checkpoint("model", device="cpu").fingerprint
