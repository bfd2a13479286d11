"""The models by name: built, written, read and refused; MSHNet's files are what they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mshnet import MSHNet
from mshnet.architectures import BUILDERS, build
from mshnet.checkpoint import CONFIG_FILE, load_model, save_model
from mshnet.config import ARCHITECTURES, Architecture, ModelConfig
from mshnet.cost import episode_flops, learnable_bytes
from mshnet.errors import InputError
from mshnet.panet import EMBEDDING_CHANNELS, PANet
from tests.mshnet.noise_episodes import episode_batch

SMALL = ModelConfig(architecture="panet", backbone="resnet18")


@pytest.fixture(scope="module")
def model() -> PANet:
    torch.manual_seed(0)
    model = build(SMALL)
    assert isinstance(model, PANet)
    return model


@pytest.fixture(scope="module")
def folder(model: PANet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model. Read only."""
    folder = tmp_path_factory.mktemp("panet")
    save_model(model, str(folder), {"image_size_px": 65})
    return folder


def test_flag_table_and_builders_name_the_same_architectures() -> None:
    assert set(get_args(Architecture)) == set(ARCHITECTURES) == set(BUILDERS)


def test_the_default_is_mshnet() -> None:
    with torch.device("meta"):
        assert type(build(ModelConfig(backbone="resnet18"))) is MSHNet


def test_only_the_projection_learns(model: PANet) -> None:
    channels = model.backbone.channels
    assert learnable_bytes(model) == 4 * EMBEDDING_CHANNELS * (channels[3] + channels[4] + 1) == 4 * 98_560
    batch = episode_batch([(0, (1, 2))], side=64)
    images = batch.query_images.float() / 255, batch.support_images.float() / 255
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    prediction = model.train()(*images, batch.support_masks.float())
    (prediction.logits.square().mean() + prediction.auxiliary[0]).backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {"relation.level3.weight", "relation.level3.bias", "relation.level4.weight"}
    assert all(float(x.grad.abs().max()) > 0 for x in model.relation.parameters() if x.grad is not None)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    model.zero_grad(set_to_none=True)


def test_a_model_folder_says_of_which_architecture_it_is(model: PANet, folder: Path) -> None:
    loaded = load_model(str(folder), expected=SMALL)
    assert type(loaded) is PANet
    assert loaded.config == SMALL
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_another_architecture_than_expected_is_refused(folder: Path) -> None:
    message = (
        "expected a checkpoint of backbone resnet18 with similarity both, found architecture panet on backbone resnet18"
    )
    with pytest.raises(InputError, match=message):
        load_model(str(folder), expected=ModelConfig(backbone="resnet18"))
    with pytest.raises(InputError, match="expected a checkpoint of architecture panet on backbone resnet50, found"):
        load_model(str(folder), expected=ModelConfig(architecture="panet"))


def changed(folder: Path, tmp_path: Path, **changes: Any) -> str:
    config = json.loads((folder / CONFIG_FILE).read_text())
    fields = {name: value for name, value in (config["model"] | changes).items() if value is not None}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "model": fields}))
    (tmp_path / "model.safetensors").hardlink_to(folder / "model.safetensors")
    return str(tmp_path)


def test_an_architecture_that_nobody_knows_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    message = "expected a model of one of the architectures mshnet, panet in .*, found 'hsnet'; use a version of mshnet"
    with pytest.raises(InputError, match=message):
        load_model(changed(folder, tmp_path, architecture="hsnet"))


def test_a_folder_without_the_field_is_mshnets(folder: Path, tmp_path: Path) -> None:
    """As every folder was before there were two; these weights are none of its."""
    with pytest.raises(InputError, match="expected a checkpoint of backbone resnet18 with similarity both, found one"):
        load_model(changed(folder, tmp_path, architecture=None))


def test_mshnets_identity_is_what_it_was_before_there_were_two() -> None:
    fields = {"backbone": "resnet18", "similarity": "cosine", "dropout": 0.1}
    assert ModelConfig(backbone="resnet18", similarity="cosine", dropout=0.1).identity() == fields
    expected = {"architecture": "panet", "backbone": "resnet18", "similarity": "both", "dropout": 0.2}
    assert SMALL.identity() == expected
    assert ModelConfig(**SMALL.identity()) == SMALL


def test_names_for_people() -> None:
    assert (ModelConfig().title, ModelConfig().label) == ("MSHNet", "resnet50 both")
    assert (SMALL.title, SMALL.label) == ("PANet", "resnet18 panet")


def test_what_is_no_choice_of_panets_is_refused() -> None:
    with pytest.raises(InputError, match="similarity is a choice of mshnet's, got 'cosine' with architecture 'panet'"):
        ModelConfig(architecture="panet", similarity="cosine")
    with pytest.raises(InputError, match="expected architecture mshnet, whose layers are counted here, got 'panet'"):
        episode_flops(SMALL, shot=1)
