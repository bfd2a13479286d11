"""Equation 5 written out: what the operator and its kernels are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-5


@dataclass(frozen=True)
class Comparison:
    """What `mean_cosine` takes: queries (b l c q), objects (b k l c n), soft masks and object positions (b k n)."""

    queries: Tensor
    objects: Tensor
    soft: Tensor
    is_object: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Comparison:
        soft = self.soft.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        return Comparison(
            self.queries.to(device, dtype), self.objects.to(device, dtype), soft, self.is_object.to(device)
        )

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.queries, self.objects, self.soft, self.is_object


def comparison(
    b: int, k: int, layers: int, channels: int, q: int, n: int, objects: tuple[int, ...], channels_last: bool = True
) -> Comparison:
    """Random features in float64; `objects` are the numbers of object positions, support after support, in turns."""
    random = torch.Generator().manual_seed(b + 10 * k + 100 * n)
    queries = torch.randn(b, layers, q, channels, dtype=torch.float64, generator=random) + 0.2
    rows = torch.randn(b, k, layers, n, channels, dtype=torch.float64, generator=random) + 0.2
    is_object = torch.zeros(b * k, n, dtype=torch.bool)
    for i, of_support in enumerate(is_object):
        of_support[torch.randperm(n, generator=random)[: objects[i % len(objects)]]] = True
    soft = torch.rand(b, k, n, dtype=torch.float64, generator=random) * 0.9 + 0.1
    if not channels_last:
        return Comparison(queries.mT.contiguous(), rows.mT.contiguous(), soft, is_object.view(b, k, n))
    return Comparison(queries.mT, rows.mT, soft, is_object.view(b, k, n))


def plain_mean_cosine(queries: Tensor, objects: Tensor, soft: Tensor, is_object: Tensor) -> Tensor:
    """(b k l q), episode by episode, shot by shot, layer by layer, the whole matrix written."""
    b, k, layers, _, _ = objects.shape
    maps = queries.new_zeros(b, k, layers, queries.shape[-1])
    for i in range(b):
        for j in range(k):
            chosen = is_object[i, j]
            if not chosen.any():
                continue
            for layer in range(layers):
                vectors = (objects[i, j, layer] * soft[i, j])[:, chosen]
                units = vectors / (vectors.norm(dim=0) + EPSILON)
                query = queries[i, layer] / (queries[i, layer].norm(dim=0) + EPSILON)
                maps[i, j, layer] = (query.T @ units).clamp(min=0).mean(1)
    return maps
