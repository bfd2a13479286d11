"""The threshold on a class's probability that suits it best, from its own examples."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

THRESHOLDS = tuple(i / 100 for i in range(1, 100))
"""That are tried."""


def counts_by_threshold(
    probability: Float[Tensor, "H W"], truth: UInt8[Tensor, "H W"]
) -> Int64[Tensor, "2 thresholds"]:
    """Intersection and union in pixels of the mask at each threshold with the true one (1 object, 0 not)."""
    limits = torch.tensor(THRESHOLDS, dtype=probability.dtype, device=probability.device)
    reached = torch.bucketize(probability, limits, right=True)  # how many thresholds a pixel is at or above
    pixels = torch.bincount((reached + (len(limits) + 1) * (truth == 1)).flatten(), minlength=2 * len(limits) + 2)
    background, foreground = pixels.view(2, -1).flip(1).cumsum(1).flip(1)[:, 1:]
    return torch.stack([foreground, background + (truth == 1).sum()])


def best_threshold(counts: Int64[Tensor, "2 thresholds"]) -> float:
    """That of the highest intersection over union; of equal ones the nearest to 0.5."""
    intersection, union = counts.double().cpu()
    iou = intersection / union.clamp(min=1)
    best = iou.max()
    equal = [threshold for threshold, value in zip(THRESHOLDS, iou, strict=True) if value == best]
    return min(equal, key=lambda threshold: abs(threshold - 0.5))
