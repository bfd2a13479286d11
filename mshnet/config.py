"""What can be set about the method. Checked on construction; importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mshnet.errors import InputError

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
Similarity = Literal["both", "cosine", "prototype"]
BACKBONES: tuple[BackboneName, ...] = ("resnet18", "resnet34", "resnet50", "resnet101")
SIMILARITIES: tuple[Similarity, ...] = ("both", "cosine", "prototype")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network's shape: all that a checkpoint must agree on."""

    backbone: BackboneName = "resnet50"
    """Frozen feature extractor; the paper's are resnet50 and resnet101, the smaller ones suit small machines."""
    similarity: Similarity = "both"
    """Which similarities are merged (paper, table 4)."""
    dropout: float = 0.2
    """Channel dropout in the merging blocks and the pyramid, 0 to below 1."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise InputError(f"backbone must be one of {', '.join(BACKBONES)}, got {self.backbone!r}")
        if self.similarity not in SIMILARITIES:
            raise InputError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {self.similarity!r}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be from 0 to below 1, got {self.dropout}")
