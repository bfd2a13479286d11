"""The frozen backbone's features, each image's computed once while they fit.

The backbone never changes and there is no augmentation, so an image's features are a constant of the
run; on a small data set they are most of the work saved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from mshnet.backbone import Features
from mshnet.data.batches import EpisodeBatch
from mshnet.feature_files import FeatureFiles
from mshnet.profiling import region

ImageFeatures = Callable[[Tensor], Features]
"""A `Backbone` or an `InferenceBackbone`: from uint8 images (n, 3, H, W)."""


@dataclass(frozen=True)
class CacheUse:
    """How often images' features were asked for, by where they came from."""

    computed: int = 0
    from_memory: int = 0
    from_disk: int = 0

    @property
    def asked(self) -> int:
        """All together."""
        return self.computed + self.from_memory + self.from_disk

    def __add__(self, other: CacheUse) -> CacheUse:
        return CacheUse(
            self.computed + other.computed, self.from_memory + other.from_memory, self.from_disk + other.from_disk
        )

    def __sub__(self, other: CacheUse) -> CacheUse:
        return CacheUse(
            self.computed - other.computed, self.from_memory - other.from_memory, self.from_disk - other.from_disk
        )


class FeatureCache:
    """Features by store row, least recently used out first. A budget of 0 keeps nothing in memory.

    With a budget, or with `image_by_image`, images go through the backbone one by one, so that an image's features
    have the same bits whichever batch asks for them first, and a resumed run the same as an undisturbed one.
    Features come in the backbone's precision, and in memory with their channels side by side.

    With `files` there is a second tier: what memory has no room for goes there. With `share` all that is computed
    does, and of the processes that share the files one computes an image while the others wait for it. Where `again`
    is given, only features of those rows are kept: the others are not asked for a second time.
    """

    def __init__(
        self,
        backbone: ImageFeatures,
        budget_bytes: int,
        files: FeatureFiles | None = None,
        *,
        share: bool = False,
        again: Collection[int] | None = None,
        image_by_image: bool = False,
    ) -> None:
        self.backbone = backbone
        self.budget_bytes = budget_bytes
        self.files = files
        self.share = share and files is not None
        self.again = again
        self.image_by_image = image_by_image or bool(budget_bytes) or files is not None
        self.computed = 0
        self.from_memory = 0
        self.from_disk = 0
        self._kept: OrderedDict[int, Features] = OrderedDict()
        self._bytes = 0

    @property
    def use(self) -> CacheUse:
        """Since construction."""
        return CacheUse(self.computed, self.from_memory, self.from_disk)

    @property
    def held_bytes(self) -> int:
        """Of the features in memory."""
        return self._bytes

    def of(self, batch: EpisodeBatch) -> tuple[Features, Features]:
        """Features of the queries (b) and of the supports (b*k, episode by episode).

        The two share no memory where there is a backward pass, which needs the queries' alone.
        """
        b = len(batch)
        with region("backbone"):
            if self.image_by_image:
                supports = [row for rows in batch.support_rows for row in rows]
                query = self._joined(batch.query_rows, batch.query_images)
                return query, self._joined(supports, batch.support_images.flatten(0, 1))
            images = torch.cat([batch.query_images, batch.support_images.flatten(0, 1)])
            self.computed += len(images)
            features = self.backbone(images)
        query = Features(*(maps[:b].clone() if torch.is_grad_enabled() else maps[:b] for maps in features))
        return query, Features(*(maps[b:] for maps in features))

    def _joined(self, rows: Sequence[int], images: UInt8[Tensor, "n 3 H W"]) -> Features:
        joined: list[Tensor] = []
        for i, row in enumerate(rows):
            features = self._of_image(row, images[i : i + 1])
            if not joined:
                joined = [_room(maps, len(rows)) for maps in features]
            for together, maps in zip(joined, features, strict=True):
                together[i] = maps[0]
        return Features(*joined)

    def _of_image(self, row: int, image: UInt8[Tensor, "1 3 H W"]) -> Features:
        if row in self._kept:
            self.from_memory += 1
            self._kept.move_to_end(row)
            return self._kept[row]
        if self.again is not None and row not in self.again:
            return self._compute(image)
        features = self._found(row, image)
        self._keep(row, features)
        return features

    def _found(self, row: int, image: UInt8[Tensor, "1 3 H W"]) -> Features:
        """From the disk, else computed."""
        if self.files is None:
            return self._compute(image)
        if (features := self._read(row, image)) is not None:
            return features
        if not self.share:
            return self._compute(image)
        with self.files.claimed(row):
            if (features := self._read(row, image)) is None:  # by whoever had the claim before
                features = self._compute(image)
                self.files.put(row, features)
            return features

    def _read(self, row: int, image: Tensor) -> Features | None:
        assert self.files is not None
        features = self.files.read(row, image.device)
        self.from_disk += features is not None
        return features

    def _compute(self, image: UInt8[Tensor, "1 3 H W"]) -> Features:
        self.computed += 1
        return self.backbone(image)

    def _keep(self, row: int, features: Features) -> None:
        self._kept[row] = features
        self._bytes += _bytes(features)
        # One is kept whatever its size, where anything is.
        while self._bytes > self.budget_bytes and len(self._kept) > bool(self.budget_bytes):
            oldest, gone = self._kept.popitem(last=False)
            self._bytes -= _bytes(gone)
            if self.files is not None and not self.share:
                self.files.write(oldest, gone)


def _room(maps: Tensor, images: int) -> Tensor:
    """For as many images' maps, channels last in memory."""
    _, layers, channels, height, width = maps.shape
    return maps.new_empty(images, layers, height, width, channels).movedim(-1, 2)


def _bytes(features: Features) -> int:
    return sum(maps.numel() * maps.element_size() for maps in features)
