"""MSHNet: few-shot segmentation by multi-similarity hyperrelations.

Axis letters, the same in every module: b episodes, k shots, l layers, c channels, h w feature grid,
H W image. Feature levels are the paper's blocks 3, 4, 5 (torchvision's layer2, layer3, layer4).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mshnet.config import ModelConfig
    from mshnet.model import MSHNet, Prediction

__all__ = ["MSHNet", "ModelConfig", "Prediction"]
__version__ = "0.1.0"

_HOMES = {"ModelConfig": "mshnet.config", "MSHNet": "mshnet.model", "Prediction": "mshnet.model"}


def __getattr__(name: str) -> object:
    # Lazy, so that a command's --help does not wait for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mshnet' has no attribute {name!r}")
