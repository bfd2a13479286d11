"""Linear layers in a row computed as one: the same numbers up to rounding, from fewer multiplications.

A resize, a 1x1 convolution and a 3x3 convolution are all linear, so they can change places or be joined,
as long as the zero padding of the last is kept: what it pads is the resized, projected map.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mshnet.masking import resize


def conv_of_resized(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "d c 3 3"],
    size: tuple[int, int],
    bias: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "b d i j"]:
    """`conv2d(resize(x, size), weight, bias, padding=1)`: the channels are mixed at x's own size.

    All nine taps are applied before the resize, where there are fewer positions; then rows, then
    columns, are resized and shifted in one product with a small matrix. For twice the size this is
    a quarter of the multiplications, and the resized map is never written.
    """
    b, _, h, w = x.shape
    height, width = size
    d = len(weight)
    rows, columns = _shifted_interpolation(h, height, x), _shifted_interpolation(w, width, x)
    positions = x.movedim(1, -1).reshape(b * h * w, -1)
    mixed: Tensor | None = None
    for tap_row, shift in zip(weight.permute(2, 1, 3, 0), rows, strict=True):
        taps = (positions @ tap_row.flatten(1)).reshape(b, h, w * 3 * d)
        shifts = shift.expand(b, height, h)
        mixed = torch.bmm(shifts, taps) if mixed is None else torch.baddbmm(mixed, shifts, taps)
    assert mixed is not None
    across = columns.permute(1, 2, 0).reshape(1, width, 3 * w).expand(b * height, width, 3 * w)
    taps = mixed.reshape(b * height, w * 3, d)
    out = torch.bmm(across, taps) if bias is None else torch.baddbmm(bias[None, None].to(taps.dtype), across, taps)
    return out.reshape(b, height, width, d).movedim(-1, 1)


def _shifted_interpolation(n_in: int, n_out: int, like: Tensor) -> Float[Tensor, "3 out in"]:
    """What the three taps of a 3-wide filter read, padding included: rows of the interpolation matrix, shifted."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    identity = torch.eye(n_in, dtype=dtype, device=like.device)[None, None]
    matrix = F.pad(resize(identity, (n_out, n_in))[0, 0], (0, 0, 1, 1))
    return torch.stack([matrix[tap : tap + n_out] for tap in range(3)]).to(like.dtype)


def conv_after_projection(
    weight: Float[Tensor, "d m 3 3"], projection: Float[Tensor, "m c 1 1"]
) -> Float[Tensor, "d c 3 3"]:
    """The weight of one 3x3 convolution that does what `projection` and then `weight` do, biases apart."""
    d, m = weight.shape[:2]
    joined = weight.movedim(1, -1).reshape(d * 9, m) @ projection[:, :, 0, 0]
    return joined.reshape(d, 3, 3, -1).movedim(-1, 1)


def projected_bias(
    weight: Float[Tensor, "d m 3 3"], bias: Float[Tensor, " m"], size: tuple[int, int]
) -> Float[Tensor, "1 d h w"]:
    """What the projection's bias comes to behind the 3x3 convolution: less at the border, where zeros are padded."""
    taps = torch.einsum("dmrs,m->drs", weight, bias)
    return F.conv2d(taps.new_ones(1, 1, *size), taps[:, None], padding=1)
