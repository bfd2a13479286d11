"""Checkpoints in the published layout: names and shapes, there and back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mshnet import ModelConfig, MSHNet
from mshnet.checkpoint import load_published_state_dict, published_state_dict
from mshnet.errors import InputError
from tests.conftest import SHARED, needs_shared
from tests.reference import golden

REFERENCE: Path = SHARED / "reference"


def build(variant: str, device: str = "cpu") -> MSHNet:
    backbone, similarity = variant.split("_")
    with torch.device(device):
        return MSHNet(ModelConfig(backbone=backbone, similarity=similarity))


@needs_shared
@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_names_and_shapes_are_the_published_ones(variant: str) -> None:
    exported = published_state_dict(build(variant, device="meta"))
    official = golden.official_shapes(REFERENCE)[variant]
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == official
    for name, tensor in exported.items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32), name


@needs_shared
@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_there_and_back(variant: str) -> None:
    state = golden.seeded_state(golden.official_shapes(REFERENCE)[variant])
    for position, name in enumerate(n for n in state if n.endswith("num_batches_tracked")):
        state[name] = torch.tensor(position)
    model = build(variant)
    load_published_state_dict(model, state)
    exported = published_state_dict(model)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)


def test_backbone_travels_along() -> None:
    source, target = build("resnet18_both"), build("resnet18_both")
    state = published_state_dict(source, include_backbone=True)
    assert {name for name in state if name.startswith("backbone.")} == set(golden.backbone_shapes("resnet18"))
    # As saved from DistributedDataParallel.
    load_published_state_dict(target, {f"module.{name}": tensor for name, tensor in state.items()})
    loaded = target.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("resnet18_both", "resnet34_both"),
        ("resnet18_both", "resnet18_cosine"),
        ("resnet18_prototype", "resnet18_both"),
    ],
)
def test_another_architecture_is_refused_and_nothing_is_changed(given: str, wanted: str) -> None:
    state = published_state_dict(build(given))
    model = build(wanted)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone, similarity = wanted.split("_")
    message = f"expected a checkpoint of backbone {backbone} with similarity {similarity}"
    with pytest.raises(InputError, match=message):
        load_published_state_dict(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
