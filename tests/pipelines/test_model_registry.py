"""Registered models as folders: what the method's addresses `models:/...` come to, in a real registry."""

from __future__ import annotations

import socket
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from mshnet import ModelConfig, MSHNet, checkpoint
from mshnet.errors import InputError
from mshnet.predict import Segmenter
from pipelines import model_registry
from pipelines.model_registry import download, register
from pipelines.tracking_client import client

NAME = "given weights, resnet18"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    network = MSHNet(ModelConfig(backbone="resnet18"))
    checkpoint.save_model(network, str(folder), {"image_size_px": 65, "origin": "imported"})
    return folder


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes, model: Path) -> str:
    """With one version."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "mlflow.db").write_bytes(empty_database)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    assert register(model, NAME, uri, "where it is from") == "1"
    return uri


def test_the_folder_comes_back(registry: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fetched = download(f"models:/{NAME}/1", tmp_path / "new", registry)
    assert fetched.is_relative_to(tmp_path)
    for name in (checkpoint.WEIGHTS_FILE, checkpoint.CONFIG_FILE):
        assert (fetched / name).is_file(), name
    assert (fetched / checkpoint.WEIGHTS_FILE).read_bytes() == (model / checkpoint.WEIGHTS_FILE).read_bytes()
    assert checkpoint.read_config(str(fetched)) == checkpoint.read_config(str(model))
    assert "Downloading" not in capfd.readouterr().err
    client(registry).set_registered_model_alias(NAME, "mine", "1")
    assert checkpoint.read_config(str(download(f"models:/{NAME}@mine", tmp_path, registry)))


def test_the_same_weights_are_one_version(registry: str, model: Path, tmp_path: Path) -> None:
    assert register(str(model), NAME, registry, "again") == "1"
    torch.manual_seed(1)
    checkpoint.save_model(MSHNet(ModelConfig(backbone="resnet18")), str(tmp_path), {"image_size_px": 65})
    number = register(tmp_path, NAME, registry, "other weights")
    assert number == "2"
    version = client(registry).get_model_version(NAME, number)
    assert (version.description, version.tags["origin"]) == ("other weights", "given weights")
    assert "miou" not in version.tags, "nothing measured them"
    assert client(registry).get_run(version.run_id).info.status == "FINISHED"


def test_the_method_finds_it_by_its_entry_point(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (plugin,) = entry_points(group="mshnet.registries", name="models")
    assert plugin.load() is model_registry
    segmenter = Segmenter.from_registry(f"models:/{NAME}/1", tracking_uri=registry, device="cpu")
    assert segmenter.image_size_px == 65
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    again = Segmenter.from_registry(f"models:/{NAME}/1", device="cpu")
    assert again.fingerprint == segmenter.fingerprint
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    segmenter.learn("x", [image], [np.ones((20, 30), dtype=bool)])
    assert segmenter(image).mask.shape == (20, 30)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"models:/{NAME}@champion", r"alias 'champion' .* found none at .*its versions: 1.*; its aliases: "),
        (f"models:/{NAME}/77", "version 77 of the registered model .* found none"),
        ("models:/other/1", f"registered models there: {NAME}"),
        (f"models:/{NAME}", r"expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/a/b/1", r"expected models:/NAME@ALIAS"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(address: str, message: str, registry: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        download(address, tmp_path, registry)


def test_looking_makes_no_database(tmp_path: Path, model: Path) -> None:
    with pytest.raises(InputError, match=r"expected MLflow's database at .*absent\.db"):
        download(f"models:/{NAME}/1", tmp_path / "got", f"sqlite:///{tmp_path}/absent.db")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no model under"):
        register(tmp_path, NAME, f"sqlite:///{tmp_path}/absent.db", "")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(InputError, match=r"expected a tracking server at .* found none that answers"):
        download(f"models:/{NAME}/1", tmp_path, f"http://127.0.0.1:{port}")


def test_a_model_of_another_project_is_named(registry: str, tmp_path: Path) -> None:
    mlflow = client(registry)
    mlflow.create_registered_model("foreign")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/MLmodel").write_text("flavors: {}")
    mlflow.create_model_version("foreign", (tmp_path / "foreign").as_uri())
    with pytest.raises(InputError, match="foreign"):
        download("models:/foreign/1", tmp_path / "got", registry)
