"""The two similarities between query positions and the support object (paper, section 4.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mshnet.kernels.cosine import mean_cosine
from mshnet.masking import SupportLevel


@torch.no_grad()
def cosine_similarity(query: Float[Tensor, "b l c h w"], support: SupportLevel) -> Float[Tensor, "b k l h w"]:
    """Mean over the object positions of the clamped cosine, one map per layer, in 0..1 (eq. 5).

    Nothing here is learnable, so nothing needs a gradient. The clamp is inside the mean, so the product
    cannot be collapsed to one prototype. No object: a map of zeros. Float32 for bfloat16 features.
    """
    maps = mean_cosine(query.flatten(3), support.features.flatten(4), support.soft_mask, support.is_object)
    return maps.reshape(*maps.shape[:3], *query.shape[3:])


class GenerativePrototypeSimilarity(nn.Module):
    """GPS (eq. 4): sigmoid of one bias-free linear map of [query features, prototype], shared by a level's layers.

    The map of 2C inputs is the sum of a query part and a prototype part, so the concatenation is
    never written.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A convolution, for PyTorch's default initialisation of the published layer.
        self.linear = nn.Conv2d(2 * channels, 1, kernel_size=1, bias=False)

    def forward(
        self, query: Float[Tensor, "b l c h w"], prototype: Float[Tensor, "b k l c"]
    ) -> Float[Tensor, "b k l h w"]:
        """Similarity in 0..1; 0.5 everywhere where the prototype sums to exactly zero (no object)."""
        query_weight, prototype_weight = self.linear.weight.flatten().chunk(2)
        from_query = (query.flatten(3).mT @ query_weight.to(query.dtype)).unflatten(-1, query.shape[3:])
        from_prototype = prototype @ prototype_weight
        has_object = (prototype.sum(-1) != 0).to(from_query.dtype)
        return torch.sigmoid(from_query[:, None] * has_object[..., None, None] + from_prototype[..., None, None])
