"""What must hold whatever the weights: about shots, about a batch's neighbours, about the frozen backbone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mshnet import ModelConfig, MSHNet
from mshnet.backbone import Backbone
from mshnet.loss import segmentation_loss
from tests import tolerances
from tests.mshnet import published

SHOTS = 3


@pytest.fixture(scope="module")
def model() -> MSHNet:
    config = ModelConfig(backbone="resnet18", similarity="both")
    return published.build(config, published.seeded(config, salt="properties")).double().eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    query = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=random)
    supports = torch.randn(3, SHOTS, 3, 64, 64, dtype=torch.float64, generator=random)
    masks = torch.zeros(3, SHOTS, 64, 64, dtype=torch.float64)
    for b in range(3):
        for k in range(SHOTS):
            masks[b, k, 4 + 9 * b : 30 + 9 * b, 3 + 8 * k : 30 + 8 * k] = 1
    masks[2, 1] = 0  # one shot without an object
    return query, supports, masks


@torch.no_grad()
def logits(model: MSHNet, query: Tensor, supports: Tensor, masks: Tensor) -> Tensor:
    found: Tensor = model.eval()(query, supports, masks).logits
    return found


def relative_distance(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape
    return float((x - y).abs().max() / y.abs().max())


def test_copies_of_one_support_equal_that_support_alone(model: MSHNet, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    query, supports, masks = batch
    alone = logits(model, query, supports[:, :1], masks[:, :1])
    copies = logits(model, query, supports[:, :1].repeat(1, SHOTS, 1, 1, 1), masks[:, :1].repeat(1, SHOTS, 1, 1))
    assert relative_distance(copies, alone) <= tolerances.SAME_COMPUTATION.bound
    other = logits(model, query, supports[:, 1:2], masks[:, 1:2])
    assert relative_distance(other, alone) > 1e-4  # another support does change the answer


def test_shot_order_is_irrelevant(model: MSHNet, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    query, supports, masks = batch
    expected = logits(model, query, supports, masks)
    for order in ([2, 0, 1], [1, 0, 2]):
        found = logits(model, query, supports[:, order], masks[:, order])
        assert relative_distance(found, expected) <= tolerances.SAME_COMPUTATION.bound
    mismatched = logits(model, query, supports[:, [2, 0, 1]], masks)
    assert relative_distance(mismatched, expected) > 1e-4  # masks must move with their images


def test_an_episode_does_not_depend_on_its_neighbours(model: MSHNet, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    query, supports, masks = batch
    together = logits(model, query, supports, masks)
    for b in range(len(query)):
        alone = logits(model, query[b : b + 1], supports[b : b + 1], masks[b : b + 1])
        assert relative_distance(alone, together[b : b + 1]) <= tolerances.SAME_COMPUTATION.bound
    # Even when the neighbours' own images change.
    changed = supports.clone()
    changed[1:] += 1
    found = logits(model, query, changed, masks)
    assert relative_distance(found[:1], together[:1]) <= tolerances.SAME_COMPUTATION.bound
    assert relative_distance(found[1:], together[1:]) > 1e-4


def test_the_backbone_is_frozen(model: MSHNet, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    query, supports, masks = batch
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    learnable_before = {name: tensor.clone() for name, tensor in model.relation.state_dict().items()}
    model.train()
    assert model.relation.training
    assert not any(module.training for module in model.backbone.modules())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    truth = torch.zeros(3, 64, 64, dtype=torch.uint8)
    truth[:, 10:40, 10:40] = 1
    segmentation_loss(model(query, supports, masks), truth, inner_weight=0.3).total.backward()
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    # The learnable part did learn, all of it, running statistics too.
    assert all(p.grad is not None for p in model.relation.parameters())
    statistics = [name for name in learnable_before if name.endswith(("running_mean", "running_var"))]
    after = model.relation.state_dict()
    assert statistics
    assert not any(torch.equal(after[name], learnable_before[name]) for name in statistics)
    model.relation.load_state_dict(learnable_before)
    model.eval()


def test_calibration_centres_every_batch_norm_and_thaws_nothing() -> None:
    torch.manual_seed(0)
    backbone = Backbone("resnet18")
    images = torch.randn(8, 3, 65, 65)
    backbone.calibrate(images)
    outputs: list[torch.Tensor] = []
    handle = backbone.layer3[1].bn2.register_forward_hook(lambda *arguments: outputs.append(arguments[2]))
    backbone(images)
    handle.remove()
    per_channel = outputs[0].transpose(0, 1).flatten(1)
    # Not exactly: while it is fitted a norm divides by the biased variance, afterwards by the unbiased one, and
    # the difference (1/200 here) adds up over twelve layers. Uncalibrated, means are off by more than 1.
    assert per_channel.mean(1).abs().max() < 0.05
    assert (per_channel.var(1) - 1).abs().max() < 0.1
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
