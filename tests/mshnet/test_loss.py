"""The loss (eq. 1) against values computed by hand, and how its truth is resized."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mshnet.config import PAPER_INNER_WEIGHT, PUBLISHED_INNER_WEIGHT
from mshnet.loss import segmentation_loss
from mshnet.model import Prediction


def prediction(low: Tensor, inner: tuple[Tensor, ...]) -> Prediction:
    """Foreground logits as given, background logits 0; the full-size logits must not enter the loss."""

    def two(x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x), x], dim=1)

    return Prediction(logits_low=two(low), inner_logits=tuple(two(x) for x in inner), size=(9, 9))


def cross_entropy(foreground: float, truth: int) -> float:
    """Of one pixel with background logit 0."""
    return math.log1p(math.exp(foreground)) - foreground * truth


def test_a_value_by_hand() -> None:
    # 9 px, level 3 of 3 px: the truth is read at 0, 3, 6 (inner) and at 0, 1, 3, 4, 6, 7 (outer, 6 px).
    mask = torch.zeros(1, 9, 9, dtype=torch.uint8)
    mask[0, 3, 6] = 1  # seen by both
    mask[0, 1, 4] = 1  # seen by the outer term only
    mask[0, 2, 2] = mask[0, 8, 8] = 1  # seen by neither
    low = torch.arange(36, dtype=torch.float64).reshape(1, 6, 6) / 10 - 1
    corners = torch.tensor([[[-1.0, 0.5], [2.0, 0.0]]], dtype=torch.float64)
    level4 = torch.tensor([[[0.3]]], dtype=torch.float64)
    level3 = torch.arange(9, dtype=torch.float64).reshape(1, 3, 3) / 4
    outer_truth = {(2, 4), (1, 3)}
    outer = sum(cross_entropy(low[0, i, j].item(), (i, j) in outer_truth) for i in range(6) for j in range(6)) / 36
    # Aligned corners: the corners stay, edges and middle are their means.
    level5_at_3 = [[-1.0, -0.25, 0.5], [0.5, 0.375, 0.25], [2.0, 1.0, 0.0]]
    maps = (level5_at_3, [[0.3] * 3] * 3, level3[0].tolist())
    inner = sum(cross_entropy(m[i][j], (i, j) == (1, 2)) for m in maps for i in range(3) for j in range(3)) / 9
    for weight in (PAPER_INNER_WEIGHT, PUBLISHED_INNER_WEIGHT, 0.0):
        losses = segmentation_loss(prediction(low, (corners, level4, level3)), mask, weight)
        assert losses.outer.item() == pytest.approx(outer, rel=1e-12)
        assert losses.inner.item() == pytest.approx(inner, rel=1e-12)
        assert losses.total.item() == pytest.approx(outer + weight * inner, rel=1e-12)
    assert (PAPER_INNER_WEIGHT, PUBLISHED_INNER_WEIGHT) == (1 / 3, 0.3)


def test_ignored_pixels_are_background() -> None:
    random = torch.Generator().manual_seed(0)
    given = prediction(
        torch.randn(2, 6, 6, generator=random), tuple(torch.randn(2, 3, 3, generator=random) for _ in range(3))
    )
    mask = torch.randint(0, 2, (2, 9, 9), generator=random, dtype=torch.uint8)
    with_ignored = mask.clone()
    with_ignored[mask == 0] = 255
    expected = segmentation_loss(given, mask, 0.3)
    found = segmentation_loss(given, with_ignored, 0.3)
    assert [x.item() for x in found] == [x.item() for x in expected]
    other = segmentation_loss(given, 1 - mask, 0.3)
    assert abs(other.total.item() - expected.total.item()) > 1e-3  # the truth does matter


def test_every_pixel_of_every_episode_weighs_the_same() -> None:
    """The mean is over all pixels of the batch, whatever is object."""
    masks = torch.zeros(2, 12, 12, dtype=torch.uint8)
    masks[1, :6] = 1
    low = torch.stack([torch.full((8, 8), 1.0), torch.full((8, 8), -2.0)])
    zeros = torch.zeros(2, 4, 4)
    losses = segmentation_loss(prediction(low, (zeros, zeros, zeros)), masks, 0.3)
    expected = cross_entropy(1, 0) / 2 + cross_entropy(-2, 0) / 4 + cross_entropy(-2, 1) / 4
    assert losses.outer.item() == pytest.approx(expected, rel=1e-6)
    assert losses.inner.item() == pytest.approx(3 * math.log(2), rel=1e-6)


def test_gradients_reach_every_head() -> None:
    heads = [torch.zeros(1, n, n, requires_grad=True) for n in (6, 2, 2, 3)]
    mask = torch.ones(1, 9, 9, dtype=torch.uint8)
    segmentation_loss(prediction(heads[0], tuple(heads[1:])), mask, 0.3).total.backward()
    # Softmax of equal logits is a half; each map's gradients sum to -(1 - 1/2) times its weight.
    for head, weight in zip(heads, (1, 0.3, 0.3, 0.3), strict=True):
        assert head.grad is not None
        assert head.grad.sum().item() == pytest.approx(-0.5 * weight, rel=1e-6)
