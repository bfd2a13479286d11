"""The mean clamped cosine as one Triton kernel: streams tiles of object positions and writes only the maps.

Each program has a tile of query positions of one layer, episode and shot. It walks over the object's
positions, whose number it reads itself: no loop runs over what is not object, nothing is padded to the
largest object, and the host never learns the counts, so it never waits. Products are accumulated in
float32, by tensor cores in bfloat16 and in full float32 (no TF32) else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from mshnet.kernels.cosine import EPSILON, norms


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    queries, objects, index, scale, counts, maps,  # pointers
    shots, layers, positions, support_positions, channels,
    query_b, query_l, query_c, query_q,  # strides
    object_b, object_k, object_l, object_c, object_n,
    epsilon,
    tile_q: tl.constexpr, tile_n: tl.constexpr, tile_c: tl.constexpr, widen: tl.constexpr,
):  # fmt: skip
    layer_of = tl.program_id(1)  # (episode, shot, layer), the last one fastest
    layer = layer_of % layers
    support = layer_of // layers
    episode = (support // shots).to(tl.int64)
    shot = support % shots
    count = tl.load(counts + support)
    rows = tl.program_id(0) * tile_q + tl.arange(0, tile_q)
    is_row = rows < positions
    columns = tl.arange(0, tile_c)
    query = queries + episode * query_b + layer * query_l + rows[:, None] * query_q + columns[None, :] * query_c
    other = objects + episode * object_b + shot * object_k + layer * object_l
    total = tl.zeros((tile_q,), dtype=tl.float32)
    for start in range(0, count, tile_n):
        at = start + tl.arange(0, tile_n)
        is_object = at < count
        place = tl.load(index + support * support_positions + at, mask=is_object, other=0)
        weight = tl.load(scale + layer_of * support_positions + place, mask=is_object, other=0.0)
        vector = other + place[None, :] * object_n + columns[:, None] * object_c
        products = tl.zeros((tile_q, tile_n), dtype=tl.float32)
        for c in range(0, channels, tile_c):
            is_channel = columns < channels - c
            q = tl.load(query + c * query_c, mask=is_row[:, None] & is_channel[None, :], other=0.0)
            o = tl.load(vector + c * object_c, mask=is_object[None, :] & is_channel[:, None], other=0.0)
            if widen:
                q, o = q.to(tl.float32), o.to(tl.float32)
            products = tl.dot(q, o, products, input_precision="ieee")
        total += tl.sum(tl.maximum(products, 0.0) * weight[None, :], axis=1)
    squares = tl.zeros((tile_q,), dtype=tl.float32)
    for c in range(0, channels, tile_c):
        is_channel = columns < channels - c
        q = tl.load(query + c * query_c, mask=is_row[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(q * q, axis=1)
    mean = total / ((tl.sqrt(squares) + epsilon) * tl.maximum(count, 1).to(tl.float32))
    tl.store(maps + layer_of.to(tl.int64) * positions + rows, mean, mask=is_row)


def fused_mean_cosine(
    queries: Float[Tensor, "b l c q"],
    objects: Float[Tensor, "b k l c n"],
    soft: Float[Tensor, "b k n"],
    is_object: Bool[Tensor, "b k n"],
) -> Float[Tensor, "b k l q"]:
    """`mean_cosine` for bfloat16 or float32 on a GPU. Any strides; fastest with the channels side by side."""
    b, k, layers, channels, n = objects.shape
    positions = queries.shape[-1]
    # The object's positions come first, in order; how many they are is known to the device alone.
    index = is_object.byte().argsort(dim=-1, descending=True, stable=True).int()
    counts = is_object.sum(-1, dtype=torch.int32)
    soft = soft.float()[:, :, None]
    scale = (soft / (soft * norms(objects.mT) + EPSILON)).contiguous()
    maps = torch.empty(b, k, layers, positions, dtype=torch.float32, device=queries.device)
    tile_q, tile_n, tile_c = (128, 128, 64) if queries.dtype == torch.bfloat16 else (64, 64, 32)
    _kernel[(triton.cdiv(positions, tile_q), b * k * layers)](
        queries, objects, index, scale, counts, maps,
        k, layers, positions, n, channels,
        *queries.stride(), *objects.stride(),
        EPSILON,
        tile_q=tile_q, tile_n=tile_n, tile_c=tile_c,
        widen=not queries.is_cuda,  # Triton's interpreter multiplies no bfloat16; the products are the same
        num_warps=8 if tile_q == 128 else 4, num_stages=3,
    )  # fmt: skip
    return maps
