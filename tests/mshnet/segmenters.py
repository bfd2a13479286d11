"""Small segmenters whose masks are neither empty nor full, though nothing was trained."""

from __future__ import annotations

import numpy as np
import torch

from mshnet import architectures
from mshnet.config import Architecture, BackboneName, ModelConfig
from mshnet.data.transforms import normalise
from mshnet.model import FewShotModel, MSHNet
from mshnet.predict import Segmenter

SIDE_PX = 65


def undecided_model(architecture: Architecture = "mshnet", backbone: BackboneName = "resnet18") -> FewShotModel:
    """Random weights, statistics as those of noise; about half of a picture of noise is foreground."""
    torch.manual_seed(3)
    model = architectures.build(ModelConfig(architecture=architecture, backbone=backbone)).eval()
    images = normalise(torch.randint(0, 256, (4, 3, SIDE_PX, SIDE_PX), dtype=torch.uint8))
    model.backbone.calibrate(images)
    halve(model, images)
    return model


def halve(model: FewShotModel, images: torch.Tensor) -> None:
    """Shift MSHNet's last bias so that half of the first image's pixels are foreground, by the second as a support."""
    if isinstance(model, MSHNet):
        mask = torch.zeros(1, 1, *images.shape[-2:])
        mask[..., 10:40, 15:50] = 1
        with torch.no_grad():
            # Larger weights of the last layer: random ones tell one pixel hardly from another.
            model.relation.pyramid.head[2].weight.mul_(200)
            logits = model(images[:1], images[1:2, None], mask).logits
            model.relation.pyramid.head[2].bias[1] -= (logits[:, 1] - logits[:, 0]).median()


def segmenter(architecture: Architecture = "mshnet", **options: str) -> Segmenter:
    """Of 65 px, on the CPU where nothing else is said."""
    return Segmenter(undecided_model(architecture), SIDE_PX, **{"device": "cpu", **options})


def picture(seed: int, height: int = 50, width: int = 70) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a brighter rectangle, and where that is."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=bool)
    top, left = rng.integers(3, height // 3), rng.integers(3, width // 3)
    mask[top : top + height // 2, left : left + width // 2] = True
    image = rng.integers(0, 128, (height, width, 3), dtype=np.uint8)
    image[mask] += 100
    return image, mask
