"""Energy maps: where each block's similarities see the object (paper, section 6.1)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from mshnet.backbone import LEVELS
from mshnet.masking import resize
from mshnet.model import Similarities

BLOCKS = {level: f"Block{level - 1}" for level in reversed(LEVELS)}
"""Levels 5, 4, 3 by the names in the paper's figure, which counts as torchvision does: Block4 is its layer4."""


def energy_maps(
    similarities: Similarities, size: tuple[int, int] | None = None
) -> dict[tuple[int, str], Float[Tensor, "b _ _"]]:
    """Mean over a block's layers and the shots of each similarity in use, 0..1, by (level, "cosine" or "prototype").

    Deepest block first. Each has its level's size, or `size`, resized as the method does.
    """
    parts = {"cosine": similarities.cosine, "prototype": similarities.prototype}
    maps = {
        (level, name): levels[level].float().mean((1, 2))
        for level in BLOCKS
        for name, levels in parts.items()
        if levels
    }
    return maps if size is None else {key: resize(energy[:, None], size)[:, 0] for key, energy in maps.items()}
