"""The fast network against the slow one in float64: forward, loss, gradient, running statistics."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mshnet import ModelConfig
from mshnet.checkpoint import published_state_dict
from mshnet.loss import segmentation_loss
from tests import tolerances
from tests.mshnet import published
from tests.reference import slow_mshnet


@dataclass(frozen=True)
class Variant:
    """A network and a batch to hold the two implementations against each other on."""

    backbone: str
    similarity: str
    shots: int
    objects: str = "boxes"
    size: tuple[int, int] = (65, 65)

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.backbone}-{self.similarity}-{self.shots}shot-{self.objects}-{height}x{width}"


VARIANTS = (
    Variant("resnet50", "both", 3),
    Variant("resnet18", "cosine", 1),
    Variant("resnet18", "cosine", 3, "one_empty"),
    Variant("resnet18", "prototype", 1),
    Variant("resnet18", "prototype", 3, "one_empty"),
    Variant("resnet18", "both", 1, "single_pixels"),
    Variant("resnet18", "both", 1, "one_empty"),
    Variant("resnet18", "both", 1, "all_empty"),
    Variant("resnet18", "both", 2, "whole_image", size=(64, 96)),
)


def support_masks(variant: Variant) -> Tensor:
    masks = torch.zeros(2, variant.shots, *variant.size, dtype=torch.float64)
    for k in range(variant.shots):
        masks[0, k, 5 : 40 + 3 * k, 20:50] = 1
        masks[1, k, 30:60, 3 + 5 * k : 25 + 5 * k] = 1
    if variant.objects == "single_pixels":
        masks[:] = 0
        masks[0, :, 0, 0] = 1  # a corner stays on every level
        masks[1, :, 32, 32] = 1  # lies between the samples: gone on level 3
    elif variant.objects == "one_empty":
        masks[1, 0] = 0
    elif variant.objects == "all_empty":
        masks[:] = 0
    elif variant.objects == "whole_image":
        masks[0] = 1
    return masks


def assert_close(found: Tensor, expected: Tensor, tolerance: tolerances.Tolerance, what: str) -> None:
    assert found.shape == expected.shape, what
    error = float((found - expected).detach().abs().max())
    scale = float(expected.detach().abs().max())
    allowed = tolerance.bound * scale + tolerances.ZERO_GRADIENT.bound
    assert error <= allowed, f"{what}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_fast_and_slow_agree(variant: Variant) -> None:
    config = ModelConfig(backbone=variant.backbone, similarity=variant.similarity, dropout=0.0)
    state = published.seeded(config, salt="parity")
    fast = published.build(config, state).double()
    slow = {name: x.double() if x.is_floating_point() else x for name, x in state.items()}

    random = torch.Generator().manual_seed(7)
    height, width = variant.size
    query = torch.randn(2, 3, height, width, dtype=torch.float64, generator=random)
    supports = torch.randn(2, variant.shots, 3, height, width, dtype=torch.float64, generator=random)
    masks = support_masks(variant)
    truth = torch.zeros(2, height, width, dtype=torch.uint8)
    truth[:, 10:45, 15:50] = 1
    truth[:, 10:12, 15:50] = 255

    # Evaluation.
    bound = tolerances.PARITY_FORWARD
    with torch.no_grad():
        fast.eval()
        maps = fast.similarities(query, supports, masks)
        found = fast(query, supports, masks)
        expected = slow_mshnet.forward(slow, query, supports, masks, variant.backbone)
    for kind in ("cosine", "prototype"):
        fast_maps, slow_maps = getattr(maps, kind), getattr(expected, kind)
        assert (fast_maps is None) == (slow_maps is None)
        for level in (3, 4, 5) if slow_maps else ():
            assert_close(fast_maps[level], slow_maps[level], bound, f"{kind} {level}")
    for level, x, y in zip((5, 4, 3), found.inner_logits, expected.inner_logits, strict=True):
        assert_close(x, y, bound, f"inner logits {level}")
    assert_close(found.logits_low, expected.logits_low, bound, "logits_low")
    assert_close(found.logits, expected.logits, bound, "logits")
    assert found.logits.shape == (2, 2, height, width)

    # Training.
    fast.train()
    losses = segmentation_loss(fast(query, supports, masks), truth, inner_weight=0.3)
    losses.total.backward()
    gradients = published.gradients(fast)
    for name in gradients:
        slow[name].requires_grad_()
    expected = slow_mshnet.forward(slow, query, supports, masks, variant.backbone, training=True)
    slow_mshnet.loss(expected, truth, inner_weight=0.3).backward()
    assert_close(losses.outer, slow_mshnet.outer_loss(expected, truth), bound, "outer loss")
    assert_close(losses.inner, slow_mshnet.inner_loss(expected, truth), bound, "inner loss")
    for name, gradient in gradients.items():
        slow_gradient = slow[name].grad
        assert slow_gradient is not None
        assert_close(gradient, slow_gradient, tolerances.PARITY_GRADIENT, f"gradient of {name}")

    after = published_state_dict(fast)
    assert all(torch.equal(after[name], slow[name]) for name in after if "num_batches" in name)
    for name in after.keys() - gradients.keys():
        assert_close(after[name].double(), slow[name].double(), bound, name)
