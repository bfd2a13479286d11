"""The two similarities between query positions and the support object (paper, section 4.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mshnet.masking import SupportLevel

_EPSILON = 1e-5  # added to norms, as in the published code
_PRODUCT_LIMIT_BYTES = 256 * 2**20  # of one slice of the query × object product


@torch.no_grad()
def cosine_similarity(query: Float[Tensor, "b l c h w"], support: SupportLevel) -> Float[Tensor, "b k l h w"]:
    """Mean over the object positions of the clamped cosine, one map per layer, in 0..1 (eq. 5).

    Nothing here is learnable, so nothing needs a gradient. The clamp is inside the mean, so the
    product cannot be collapsed to one prototype; it is made in slices of query positions instead,
    which bounds its memory. No object: a map of zeros.
    """
    b, layers, _, h, w = query.shape
    k = support.features.shape[1]
    queries = _unit(query.flatten(3), dim=2)
    objects = _unit(support.features, dim=3) * support.is_object[:, :, None, None]
    count = support.is_object.sum(-1).clamp(min=1)[:, :, None, None]
    row_bytes = b * k * layers * objects.shape[-1] * objects.element_size()
    slices = queries.split(max(1, _PRODUCT_LIMIT_BYTES // row_bytes), dim=-1)
    # A position outside the object is a zero vector: its clamped cosine adds nothing to the sum.
    sums = [torch.einsum("blcq,bklcn->bklqn", part, objects).relu_().sum(-1) for part in slices]
    return (torch.cat(sums, dim=-1) / count).reshape(b, k, layers, h, w)


def _unit(x: Tensor, dim: int) -> Tensor:
    unit: Tensor = x / (x.norm(dim=dim, keepdim=True) + _EPSILON)
    return unit


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
        from_query = torch.einsum("blchw,c->blhw", query, query_weight)
        from_prototype = prototype @ prototype_weight
        has_object = (prototype.sum(-1) != 0).to(query.dtype)
        return torch.sigmoid(from_query[:, None] * has_object[..., None, None] + from_prototype[..., None, None])
