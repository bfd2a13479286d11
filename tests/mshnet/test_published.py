"""A checkpoint in the published layout is recognised by its tensors, and refused where it fits nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mshnet import ModelConfig, MSHNet
from mshnet.checkpoint import published_state_dict
from mshnet.errors import InputError
from mshnet.published import parts, recognised
from tests.conftest import SHARED, needs_shared
from tests.reference import golden


def shapes_only(backbone: str, similarity: str, include_backbone: bool = False) -> dict[str, Tensor]:
    with torch.device("meta"):
        return published_state_dict(MSHNet(ModelConfig(backbone=backbone, similarity=similarity)), include_backbone)


@pytest.mark.parametrize("similarity", ["both", "cosine", "prototype"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
def test_the_network_is_recognised_by_shapes_alone(backbone: str, similarity: str) -> None:
    found = recognised({f"module.{name}": value for name, value in shapes_only(backbone, similarity).items()})
    assert (found.backbone, found.similarity) == (backbone, similarity)


def test_what_looks_like_two_networks_is_told_by_the_backbones_weights_or_by_word() -> None:
    assert recognised(shapes_only("resnet34", "cosine")).backbone == "resnet50"  # the published code's
    assert recognised(shapes_only("resnet34", "cosine"), backbone="resnet34").backbone == "resnet34"
    assert recognised(shapes_only("resnet34", "cosine", include_backbone=True)).backbone == "resnet34"


@needs_shared
@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_the_official_names_and_shapes_are_recognised(variant: str) -> None:
    shapes = golden.official_shapes(SHARED / "reference")[variant]
    found = recognised({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert f"{found.backbone}_{found.similarity}" == variant


@pytest.mark.parametrize(
    ("lost", "more", "message"),
    [
        ("merge.decoderOut.0.weight", {}, "differs in 1 of 332 tensors .first: merge.decoderOut.0.weight"),
        ("", {"merge.extra": torch.zeros(3)}, "differs in 1 of 332 .*merge.extra, expected shape none, found .3,"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_with_the_tensor(
    lost: str, more: dict[str, Tensor], message: str
) -> None:
    state = {**shapes_only("resnet18", "both"), **more}
    state.pop(lost, None)
    with pytest.raises(InputError, match=message):
        recognised(state)


def test_another_layout_and_another_network_than_asked_for_are_refused() -> None:
    with pytest.raises(InputError, match="published layout"):
        recognised({"conv1.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="leave --backbone and --similarity out"):
        recognised(shapes_only("resnet18", "both"), backbone="resnet50")


def test_the_backbone_is_told_apart() -> None:
    learnable, backbone = parts({"module.merge.a": torch.zeros(1), "module.backbone.conv1.weight": torch.ones(2)})
    assert list(learnable) == ["merge.a"]
    assert list(backbone) == ["conv1.weight"]
