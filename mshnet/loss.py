"""The training loss (paper, eq. 1)."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from mshnet.masking import resize
from mshnet.model import Prediction


class Losses(NamedTuple):
    """total = outer + inner_weight * inner, and what the model adds of its own; inner is the sum over the levels."""

    total: Float[Tensor, ""]
    outer: Float[Tensor, ""]
    inner: Float[Tensor, ""]


def segmentation_loss(prediction: Prediction, query_masks: UInt8[Tensor, "b H W"], inner_weight: float) -> Losses:
    """Cross-entropy of the final logits plus the weighted sum of the inner ones, plus the model's auxiliary losses.

    query_masks hold 1 for the object and anything else for background: pixels labelled 255 are
    background here and are left out only of the metric.
    Fidelity: the weight is 1/3 in eq. 1 and 0.3 in the published code. The truth is resized from full
    size to twice level 3's size for the outer term, to level 3's for the inner ones.
    """
    height, width = prediction.logits_low.shape[-2:]
    inner_size = (height // 2, width // 2)
    truth = (query_masks == 1).unsqueeze(1).float()  # interpolate takes no integers
    outer_truth = F.interpolate(truth, size=(height, width), mode="nearest")[:, 0].long()
    inner_truth = F.interpolate(truth, size=inner_size, mode="nearest")[:, 0].long()
    outer = F.cross_entropy(prediction.logits_low, outer_truth)
    inner = sum(
        (F.cross_entropy(resize(logits, inner_size), inner_truth) for logits in prediction.inner_logits),
        start=outer.new_zeros(()),
    )
    total = sum(prediction.auxiliary, start=outer + inner_weight * inner)
    return Losses(total=total, outer=outer, inner=inner)
