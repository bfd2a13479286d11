"""The mean clamped cosine between query and object positions (eq. 5) without the matrix of their products.

One operator, `mshnet::mean_cosine`, so that `torch.compile` sees one node whatever computes it: a blocked
matrix product over the object's positions only, or on a CUDA device, where Triton can be imported, a fused
kernel (`mshnet.kernels.cosine_triton`).

A factor of 0 or more can be taken out of the clamp. So no side is normalised as a whole: object vectors are
scaled where they are gathered, and query positions after their products are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPSILON = 1e-5
"""Added to norms, as in the published code."""
_BLOCK_BYTES = 2 * 2**20
"""Of one block of products: what stays in the cores' caches until it is summed."""
_MIN_BLOCK = 64  # rows; fewer starve the matrix product


def mean_cosine(
    queries: Float[Tensor, "b l c q"],
    objects: Float[Tensor, "b k l c n"],
    soft: Float[Tensor, "b k n"],
    is_object: Bool[Tensor, "b k n"],
) -> Float[Tensor, "b k l q"]:
    """Mean over the positions n of the object of relu(cos(queries[q], soft[n] * objects[n])); 0 without object.

    Float32 for bfloat16 features, whose sums are float32 too. Fastest where channels are what lies side by
    side in memory. Has no gradient.
    """
    maps: Tensor = torch.ops.mshnet.mean_cosine(queries, objects, soft, is_object)
    return maps


@torch.library.custom_op(
    "mshnet::mean_cosine",
    mutates_args=(),
    schema="(Tensor queries, Tensor objects, Tensor soft, Tensor is_object) -> Tensor",
)
def _mean_cosine(queries: Tensor, objects: Tensor, soft: Tensor, is_object: Tensor) -> Tensor:
    if queries.is_cuda and queries.dtype in (torch.bfloat16, torch.float32) and _has_triton():
        from mshnet.kernels.cosine_triton import fused_mean_cosine

        return fused_mean_cosine(queries, objects, soft, is_object)
    return blocked_mean_cosine(queries, objects, soft, is_object)


@_mean_cosine.register_fake
def _(queries: Tensor, objects: Tensor, soft: Tensor, is_object: Tensor) -> Tensor:
    return queries.new_empty(*objects.shape[:3], queries.shape[-1], dtype=exact(queries.dtype))


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


@dataclass(frozen=True, eq=False)
class ObjectVectors:
    """One support's features at the positions of its object, all that the cosine reads of it."""

    features: Float[Tensor, "l m c"]
    soft: Float[Tensor, " m"]


def gathered(
    features: Float[Tensor, "l c n"], soft: Float[Tensor, " n"], is_object: Bool[Tensor, " n"]
) -> ObjectVectors:
    """Those of the object's m positions, copied."""
    positions = is_object.nonzero().flatten()
    return ObjectVectors(features.mT.index_select(1, positions), soft[positions])


def mean_cosine_of(queries: Float[Tensor, "b l c q"], shots: Sequence[ObjectVectors]) -> Float[Tensor, "b k l q"]:
    """`mean_cosine` of b queries, the supports of all of which are the same k: to the same bits, nothing padded."""
    if not (queries.is_cuda and _has_triton()):
        maps = queries.new_zeros(len(queries), len(shots), *queries.shape[1::2], dtype=exact(queries.dtype))
        units = [_unit_vectors(shot) for shot in shots]
        for query, of_query in zip(queries, maps, strict=True):
            _compare_layers(query, units, of_query)
        return maps
    b = len(queries)
    found = []
    for shot in shots:
        soft = shot.soft.expand(b, 1, -1)
        objects = shot.features.mT.expand(b, 1, -1, -1, -1)
        found.append(mean_cosine(queries, objects, soft, torch.ones_like(soft, dtype=torch.bool)))
    return torch.cat(found, dim=1)


def exact(dtype: torch.dtype) -> torch.dtype:
    """Of sums: float32 for bfloat16, else the same."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def norms(rows: Float[Tensor, "*positions c"]) -> Float[Tensor, "*positions"]:
    """Lengths of the vectors, in the type of sums."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=exact(rows.dtype))
    return lengths


def blocked_mean_cosine(
    queries: Float[Tensor, "b l c q"],
    objects: Float[Tensor, "b k l c n"],
    soft: Float[Tensor, "b k n"],
    is_object: Bool[Tensor, "b k n"],
) -> Float[Tensor, "b k l q"]:
    """The same on any device: gather the object's positions, then block by block product, clamp and sum."""
    b, k, layers = objects.shape[:3]
    maps = queries.new_zeros(b, k, layers, queries.shape[-1], dtype=exact(queries.dtype))
    for episode in range(b):
        units = [
            _unit_vectors(gathered(objects[episode, shot], soft[episode, shot], is_object[episode, shot]))
            for shot in range(k)
        ]
        _compare_layers(queries[episode], units, maps[episode])
    return maps


def _unit_vectors(of: ObjectVectors) -> Float[Tensor, "l m c"]:
    """A masked vector is soft * f; so its unit vector is f * soft / (soft * |f| + eps)."""
    rows, soft = of.features, of.soft.to(exact(of.features.dtype))
    return rows * (soft / (soft * norms(rows) + EPSILON)).to(rows.dtype)[..., None]


def _compare_layers(query: Float[Tensor, "l c q"], units: list[Tensor], maps: Float[Tensor, "k l q"]) -> None:
    """Fill one query's maps; `units` are (l, m, c), each with its own number of positions."""
    for layer, of_layer in enumerate(query):
        _compare_blocks(of_layer.mT, [unit[layer].mT for unit in units], maps[:, layer])


def _compare_blocks(rows: Float[Tensor, "q c"], shots: list[Tensor], maps: Float[Tensor, "k q"]) -> None:
    """Fill one layer's maps; `shots` are (c, m), each with its own number of positions."""
    most = max(unit.shape[1] for unit in shots)
    size = max(_MIN_BLOCK, _BLOCK_BYTES // max(1, most * rows.element_size()))
    for block, target in zip(rows.split(size), maps.split(size, dim=1), strict=True):
        lengths = norms(block) + EPSILON
        for unit, of_shot in zip(shots, target, strict=True):
            if unit.shape[1]:
                of_shot.copy_((block @ unit).relu_().sum(-1, dtype=maps.dtype) / (lengths * unit.shape[1]))
