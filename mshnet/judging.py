"""From what a predictor gives to a mask at any size, and the true mask that it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from mshnet.config import IGNORE_INDEX
from mshnet.errors import InputError
from mshnet.masking import resize
from mshnet.protocols import Ignore, Resize

if TYPE_CHECKING:
    from mshnet.data.batches import EpisodeBatch
    from mshnet.data.store.images import ImageStore


@dataclass(frozen=True)
class Segmentation:
    """Queries segmented at the predictor's own resolution; `masks` has them at any other."""

    scores: Float[Tensor, "b c _ _"]
    """Two channels: background and foreground, the larger one counts. One: foreground above the threshold."""
    threshold: float = 0.0

    def masks(self, size: tuple[int, int]) -> Bool[Tensor, "b H W"]:
        """Where the foreground is, at a height and width: scores are resized (bilinear), then compared."""
        scores = resize(self.scores, size)
        return scores[:, 1] > scores[:, 0] if scores.shape[1] == 2 else scores[:, 0] > self.threshold

    def episode(self, i: int) -> Segmentation:
        """That of one query."""
        return Segmentation(self.scores[i : i + 1], self.threshold)


@dataclass(frozen=True)
class Judging:
    """Against what queries are held: at which size, and what becomes of pixels labelled 255."""

    resize: Resize = "square"
    ignore: Ignore = "excluded"
    store: ImageStore | None = None
    """Where the original masks are, for resize original."""

    def __post_init__(self) -> None:
        if self.resize == "original" and self.store is None:
            raise InputError("judging at original size needs the store that holds the original masks, got none")

    def truth(self, batch: EpisodeBatch) -> Sequence[UInt8[Tensor, "_ _ _"]]:
        """True masks on the batch's device: one tensor of all queries, or one per query at its own size."""
        masks: Sequence[Tensor] = [batch.query_masks]
        if self.resize == "original" and self.store is not None:
            queries = zip(batch.query_rows, batch.class_ids, strict=True)
            found = [self.store.original_mask(row, class_id, with_ignore=True) for row, class_id in queries]
            masks = [mask[None].to(batch.query_masks.device, non_blocking=True) for mask in found]
        if self.ignore == "background":
            masks = [torch.where(mask == IGNORE_INDEX, 0, mask) for mask in masks]
        return masks
