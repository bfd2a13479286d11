"""What of a support image is the object: soft masks per level, object positions, prototypes (paper, eq. 2-3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SupportLevel:
    """One level's support features with the soft mask that weights them and the positions that count as object."""

    features: Float[Tensor, "b k l c h w"]
    soft_mask: Float[Tensor, "b k n"]
    is_object: Bool[Tensor, "b k n"]


def resize(x: Float[Tensor, "n c h w"], size: tuple[int, int]) -> Float[Tensor, "n c i j"]:
    """Bilinear with aligned corners: the only interpolation of the method, ground truth excepted."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def mask_pyramid(
    masks: Float[Tensor, "b k H W"], sizes: tuple[tuple[int, int], ...]
) -> tuple[Float[Tensor, "b k _ _"], ...]:
    """Soft masks in 0..1 at the sizes of levels 3, 4, 5.

    Each is resized from the one before, the first by way of twice its own size.
    Fidelity: the paper says only "down-sampled"; the chain is the published code's.
    """
    height, width = sizes[0]
    soft = resize(masks.flatten(0, 1).unsqueeze(1), (2 * height, 2 * width))
    pyramid = []
    for size in sizes:
        soft = resize(soft, size)
        pyramid.append(soft.squeeze(1).unflatten(0, masks.shape[:2]))
    return tuple(pyramid)


def object_positions(soft_mask: Float[Tensor, "b k h w"]) -> Bool[Tensor, "b k n"]:
    """Positions whose mask value is at least the mean of the mask's positive values.

    Fidelity: not in the paper; the published code's rule, equality included.
    """
    values = soft_mask.flatten(2)
    positive = values > 0
    mean = values.sum(-1, keepdim=True) / positive.sum(-1, keepdim=True)  # 0/0 = nan compares false: no object
    return (values >= mean) & positive


def select_object(features: Float[Tensor, "b k l c h w"], soft_mask: Float[Tensor, "b k h w"]) -> SupportLevel:
    """Mark the object's positions; nothing is multiplied yet, as few of the features are needed."""
    return SupportLevel(features=features, soft_mask=soft_mask.flatten(2), is_object=object_positions(soft_mask))


@torch.no_grad()
def prototypes(support: SupportLevel) -> Float[Tensor, "b k l c"]:
    """Mean of the soft-masked features over the object positions (eq. 3); zero where there is no object.

    One product per layer, with no masked copy of the features.
    """
    is_object = support.is_object.to(support.soft_mask.dtype)
    weights = support.soft_mask * is_object / is_object.sum(-1, keepdim=True).clamp(min=1)
    rows = support.features.flatten(4).mT
    total = weights[:, :, None, None].to(rows.dtype) @ rows
    return total.squeeze(-2).to(weights.dtype)
