"""The backbone made fast: the same features, from copies, and nothing of the original touched."""

from __future__ import annotations

import pytest
import torch

from mshnet.backbone import Backbone, Features, InferenceBackbone
from mshnet.data.transforms import normalise
from mshnet.features import FeatureCache
from tests import tolerances
from tests.mshnet.noise_episodes import episode_batch, picture


def backbone(name: str) -> Backbone:
    """With statistics that are not the initial ones, so that folding has something to fold."""
    torch.manual_seed(0)
    made = Backbone(name)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.uniform_(0.5, 1.0)
            module.bias.normal_(0, 0.1)
    return made


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack([picture(row)[0] for row in range(2)])


def error(found: Features, expected: Features) -> float:
    return max(
        float((x.double() - y.double()).abs().max() / y.double().abs().max())
        for x, y in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_features_are_the_backbones(name: str, images: torch.Tensor) -> None:
    original = backbone(name)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    expected = original(normalise(images))
    for dtype, bound in (
        (torch.float32, tolerances.FOLDED_FLOAT32.bound),
        (torch.bfloat16, tolerances.FOLDED_BFLOAT16.bound),
    ):
        found = InferenceBackbone(original, dtype)(images)
        assert [maps.shape for maps in found] == [maps.shape for maps in expected]
        assert {maps.dtype for maps in found} == {dtype}
        assert error(found, expected) <= bound
    after = original.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(original(images).level5, expected.level5)  # uint8 is normalised here


def test_it_is_a_copy(images: torch.Tensor) -> None:
    original = backbone("resnet18")
    fast = InferenceBackbone(original)
    expected = fast(images)
    original.bn1.running_mean += 1
    assert torch.equal(fast(images).level3, expected.level3)
    assert error(InferenceBackbone(original)(images), expected) > 1e-3
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_channels_lie_side_by_side(images: torch.Tensor) -> None:
    """Of the backbone's own features, and of what a cache joins."""
    fast = InferenceBackbone(backbone("resnet18"), torch.bfloat16)
    batch = episode_batch([(0, (1, 2)), (3, (0, 4))])
    for features in (fast(images), *FeatureCache(fast, 0).of(batch), *FeatureCache(fast, 2**30).of(batch)):
        for maps in features:
            assert maps.stride(2) == 1
            assert maps.dtype == torch.bfloat16


def test_the_backward_pass_keeps_no_support_features() -> None:
    fast = InferenceBackbone(backbone("resnet18"))
    batch = episode_batch([(0, (1, 2))])
    query, support = FeatureCache(fast, 0).of(batch)
    for of_query, of_support in zip(query, support, strict=True):
        assert of_query.untyped_storage().data_ptr() != of_support.untyped_storage().data_ptr()
        assert of_query.untyped_storage().nbytes() == of_query.numel() * of_query.element_size()
