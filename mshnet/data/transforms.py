"""From stored bytes' uint8 pixels to what the backbone reads."""

from __future__ import annotations

import functools

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images: UInt8[Tensor, "*n 3 H W"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*n 3 H W"]:
    """RGB 0..255 to zero mean and unit deviation by ImageNet's statistics, on the images' device."""
    mean = torch.tensor(IMAGENET_MEAN, dtype=dtype, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, dtype=dtype, device=images.device)[:, None, None]
    return (images.to(dtype) / 255 - mean) / std


def nearest(mask: UInt8[Tensor, "H W"], side_px: int) -> UInt8[Tensor, "S S"]:
    """A mask at the network's size, as `F.interpolate(mode="nearest")` gives it."""
    rows, columns = (torch.from_numpy(nearest_indices(size, side_px)) for size in mask.shape)
    return mask[rows][:, columns]


@functools.lru_cache(maxsize=4096)
def nearest_indices(size: int, side: int) -> Int64[np.ndarray, " S"]:
    """Which of `size` pixels each of `side` shows."""
    # Torch's own choice: for uint8 it computes in float32 (and rounds), as for float32, but not for float64.
    positions = torch.arange(size, dtype=torch.float32)[None, None]
    return F.interpolate(positions, size=side, mode="nearest")[0, 0].numpy().astype(np.int64)
