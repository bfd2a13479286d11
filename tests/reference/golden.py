"""The golden vectors of the published implementation, and the rule that its seeded weights follow."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CASES = (
    "resnet50_1shot_both",
    "resnet50_5shot_both",
    "resnet50_1shot_cosine",
    "resnet50_1shot_prototype",
    "resnet101_1shot_both",
    "resnet50_1shot_tiny_object",
    "resnet50_1shot_empty_support",
)
VARIANTS = ("resnet50_both", "resnet50_cosine", "resnet50_prototype", "resnet101_both")
"""Of official_state_dict.json."""


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """One batch with the published implementation's answers (see the reference's README for the keys)."""

    name: str
    backbone: str
    similarity: str
    salt: str
    arrays: dict[str, np.ndarray]
    training: dict[str, float]
    """lr, momentum, weight_decay, inner_loss_weight."""

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def number(self, key: str) -> float:
        return float(self.arrays[key])

    @property
    def query_mask(self) -> Tensor:
        return self.tensor("query_mask")

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised query and support images and the support masks."""
        return (
            normalise(self.tensor("query_image")).to(dtype),
            normalise(self.tensor("support_images")).to(dtype),
            self.tensor("support_masks").to(dtype),
        )

    def state(self, reference: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Backbone and `merge.*` weights of this case."""
        variant = f"{self.backbone}_{self.similarity}"
        shapes = backbone_shapes(self.backbone) | official_shapes(reference)[variant]
        return {name: tensor.to(dtype) for name, tensor in seeded_state(shapes, self.salt).items()}


def load_case(name: str, reference: Path) -> GoldenCase:
    """Read `golden/NAME.npz` under the reference folder."""
    with np.load(reference / "golden" / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    meta = json.loads(str(arrays.pop("meta")))
    training = {key: meta[key] for key in ("lr", "momentum", "weight_decay", "inner_loss_weight")}
    return GoldenCase(
        name=name,
        backbone=meta["backbone"],
        similarity=meta["similarity"],
        salt=meta["salt"],
        arrays=arrays,
        training=training,
    )


def official_shapes(reference: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Variant -> published name -> shape."""
    listed = json.loads((reference / "official_state_dict.json").read_text())
    return {variant: {name: tuple(shape) for name, shape in listed[variant].items()} for variant in VARIANTS}


def backbone_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """`backbone.` + torchvision's name -> shape, without the classifier."""
    import torchvision

    with torch.device("meta"):
        network = torchvision.models.get_model(backbone, weights=None)
    return {
        f"backbone.{name}": tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if not name.startswith("fc.")
    }


def seeded_tensor(name: str, shape: tuple[int, ...], salt: str = "") -> Tensor:
    """The float32 tensor that NAME has in every golden case with this salt."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    random = np.random.RandomState(zlib.crc32((salt + name).encode()) & 0x7FFFFFFF)
    x = random.standard_normal(shape).astype(np.float32)
    if name.endswith("running_mean"):
        x = 0.1 * x
    elif name.endswith("running_var"):
        x = np.exp(0.1 * x)
    elif name.endswith("bias"):
        x = 0.05 * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x
    else:
        x = x * float(np.sqrt(2 / np.prod(shape[1:])))
        if name.startswith("backbone.") and name.endswith("conv3.weight"):
            x = x * 0.3
    return torch.from_numpy(x.astype(np.float32))


def seeded_state(shapes: dict[str, tuple[int, ...]], salt: str = "") -> dict[str, Tensor]:
    return {name: seeded_tensor(name, shape, salt) for name, shape in shapes.items()}


def normalise(images: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) -> float32 by ImageNet's mean and deviation; the golden run casts this up."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return (images.float() / 255 - mean) / deviation
