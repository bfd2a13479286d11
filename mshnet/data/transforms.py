"""From stored bytes' uint8 pixels to what the backbone reads."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images: UInt8[Tensor, "*n 3 H W"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*n 3 H W"]:
    """RGB 0..255 to zero mean and unit deviation by ImageNet's statistics, on the images' device."""
    mean = torch.tensor(IMAGENET_MEAN, dtype=dtype, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, dtype=dtype, device=images.device)[:, None, None]
    return (images.to(dtype) / 255 - mean) / std
