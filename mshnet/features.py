"""The frozen backbone's features, each image's computed once while they fit.

The backbone never changes and there is no augmentation, so an image's features are a constant of the
run; on a small data set they are most of the work saved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from mshnet.backbone import Features
from mshnet.data.batches import EpisodeBatch
from mshnet.profiling import region

ImageFeatures = Callable[[Tensor], Features]
"""A `Backbone` or an `InferenceBackbone`: from uint8 images (n, 3, H, W)."""


class FeatureCache:
    """Features by store row, least recently used out first. A budget of 0 keeps nothing.

    With a budget, images go through the backbone one by one, so that an image's features have the
    same bits whichever batch asks for them first, and a resumed run the same as an undisturbed one.
    Features come in the backbone's precision, and in memory with their channels side by side.
    """

    def __init__(self, backbone: ImageFeatures, budget_bytes: int) -> None:
        self.backbone = backbone
        self.budget_bytes = budget_bytes
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[int, Features] = OrderedDict()
        self._bytes = 0

    def of(self, batch: EpisodeBatch) -> tuple[Features, Features]:
        """Features of the queries (b) and of the supports (b*k, episode by episode).

        The two share no memory where there is a backward pass, which needs the queries' alone.
        """
        b = len(batch)
        rows = [*batch.query_rows, *(row for rows in batch.support_rows for row in rows)]
        images = torch.cat([batch.query_images, batch.support_images.flatten(0, 1)])
        with region("backbone"):
            if self.budget_bytes:
                found = self._cached(rows, images)
                return _joined(found[:b]), _joined(found[b:])
            features = self.backbone(images)
        query = Features(*(maps[:b].clone() if torch.is_grad_enabled() else maps[:b] for maps in features))
        return query, Features(*(maps[b:] for maps in features))

    def _cached(self, rows: Sequence[int], images: UInt8[Tensor, "n 3 H W"]) -> list[Features]:
        found = []
        for i, row in enumerate(rows):
            if row in self._kept:
                self.hits += 1
                self._kept.move_to_end(row)
            else:
                self.misses += 1
                self._keep(row, self.backbone(images[i : i + 1]))
            found.append(self._kept[row])
            self._evict()
        return found

    def _keep(self, row: int, features: Features) -> None:
        self._kept[row] = features
        self._bytes += _bytes(features)

    def _evict(self) -> None:
        while self._bytes > self.budget_bytes and len(self._kept) > 1:
            _, features = self._kept.popitem(last=False)
            self._bytes -= _bytes(features)


def _joined(found: Sequence[Features]) -> Features:
    # Through (n, l, h, w, c), as torch.cat would put it into the order of its axes.
    levels = zip(*found, strict=True)
    return Features(*(torch.cat([maps.movedim(2, -1) for maps in level]).movedim(-1, 2) for level in levels))


def _bytes(features: Features) -> int:
    return sum(maps.numel() * maps.element_size() for maps in features)
