"""A checkpoint file of the published layout to a model folder: the same network, nothing executed, nothing lost."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mshnet import ModelConfig, MSHNet
from mshnet.checkpoint import load_backbone_weights, load_model, published_state_dict, read_config
from mshnet.commands.import_published import command
from mshnet.errors import InputError


@pytest.fixture(scope="module")
def network() -> MSHNet:
    torch.manual_seed(0)
    return MSHNet(ModelConfig(backbone="resnet18", similarity="prototype")).eval()


@pytest.fixture(scope="module")
def whole(network: MSHNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the backbone, as DataParallel saves it."""
    path = tmp_path_factory.mktemp("published") / "best_model.pt"
    torch.save({f"module.{name}": value for name, value in published_state_dict(network, True).items()}, path)
    return path


def test_the_folder_holds_the_same_network(
    network: MSHNet, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(str(whole), str(tmp_path / "model"), image_size_px=65)
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (made["backbone"], made["similarity"]) == ("resnet18", "prototype")
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
    config = read_config(str(tmp_path / "model"))
    assert config["image_size_px"] == 65
    assert config["source"] == {"file": "best_model.pt", "sha256": made["source_sha256"]}
    assert "git_commit" not in config  # nobody here trained it


@pytest.mark.parametrize("in_the_file", [True, False])
def test_the_backbone_that_is_given_is_taken(network: MSHNet, tmp_path: Path, in_the_file: bool) -> None:
    """Whether or not the file has one."""
    torch.save(published_state_dict(network, include_backbone=in_the_file), tmp_path / "a.pt")
    command(str(tmp_path / "a.pt"), str(tmp_path / "model"), backbone_weights="random")
    drawn = MSHNet(network.config).backbone
    load_backbone_weights(drawn, "random")
    found = load_model(str(tmp_path / "model")).backbone.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in drawn.state_dict().items())


def test_what_cannot_be_used_is_refused_and_nothing_is_written(network: MSHNet, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"

    def refused(path: Path, message: str, **settings: Any) -> None:
        with pytest.raises(InputError, match=message):
            command(str(path), str(out), **settings)
        assert not out.exists()

    state = published_state_dict(network, include_backbone=True)
    torch.save(state | {"merge.decoderOut.0.weight": torch.full((128, 256, 3, 3), torch.nan)}, tmp_path / "nan.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"merge.a": print}, protocol=2))
    refused(tmp_path / "nan.pt", "finite weights .*merge.decoderOut.0.weight")
    refused(tmp_path / "code.pt", "cannot be read safely")
    refused(tmp_path / "absent.pt", "no weights at")
    refused(whole, "leave --backbone and --similarity out", similarity="cosine")
    refused(whole, "image_size_px must be 33 or more", image_size_px=20)


def test_a_model_that_is_there_is_kept(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match="--overwrite"):
        command(str(whole), str(out))
    assert (out / "config.json").read_text() == "{}"
    command(str(whole), str(out), overwrite=True)
    assert load_model(str(out)).config.backbone == "resnet18"
