"""What a trained model must beat: foreground everywhere, and a threshold on the cosine to the prototype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from mshnet.backbone import Features
from mshnet.config import IGNORE_INDEX
from mshnet.data.batches import EpisodeBatch
from mshnet.engine import Predictor
from mshnet.features import FeatureCache
from mshnet.judging import Segmentation
from mshnet.masking import mask_pyramid, resize
from mshnet.metrics import Counts, miou, sum_by_class

THRESHOLDS = tuple(float(x) for x in np.arange(-20, 100) / 100)
"""Cosines tried as the threshold."""


def foreground(query: Features, support: Features, batch: EpisodeBatch) -> Segmentation:
    """Everything is foreground."""
    return Segmentation(torch.ones(len(batch), 1, 1, 1, device=batch.query_masks.device))


def prototype_cosine(query: Features, support: Features, batch: EpisodeBatch) -> Float[Tensor, "b h w"]:
    """Cosine between each query position of level 4 and the object's mean feature over all shots, -1..1.

    Features are the last map of level 4 (torchvision's layer3), of any precision, in float32 from here on;
    nothing is trained.
    """
    masks = batch.support_masks.float()
    queries = torch.relu(query.level4[:, -1].float())
    supports = torch.relu(support.level4[:, -1].float()).unflatten(0, masks.shape[:2])
    size = (queries.shape[-2], queries.shape[-1])
    (soft,) = mask_pyramid(masks, (size,))
    prototype = torch.einsum("bkchw,bkhw->bc", supports, soft)
    return F.cosine_similarity(queries, prototype[:, :, None, None], dim=1)


def prototype_threshold(threshold: float) -> Predictor:
    """Foreground is where the cosine to the prototype exceeds the threshold."""

    def predict(query: Features, support: Features, batch: EpisodeBatch) -> Segmentation:
        return Segmentation(prototype_cosine(query, support, batch)[:, None], threshold)

    return predict


@dataclass(frozen=True)
class ThresholdCounts:
    """What each of THRESHOLDS gives on n episodes."""

    counts: Counts
    """Arrays of shape (thresholds, n, 2)."""
    class_ids: Int64[np.ndarray, " n"]

    @staticmethod
    def concatenated(parts: Sequence[ThresholdCounts]) -> ThresholdCounts:
        """Of all parts' episodes, in order."""
        counts = Counts(
            np.concatenate([part.counts.intersection for part in parts], axis=1),
            np.concatenate([part.counts.union for part in parts], axis=1),
        )
        return ThresholdCounts(counts, np.concatenate([part.class_ids for part in parts]))

    def best(self, classes: Sequence[int]) -> float:
        """The single threshold with the highest mIoU over the classes; of equal ones the first."""
        scores = [
            miou(sum_by_class(Counts(intersection, union), self.class_ids.tolist(), classes))
            for intersection, union in zip(self.counts.intersection, self.counts.union, strict=True)
        ]
        return THRESHOLDS[int(np.argmax(scores))]


@torch.no_grad()
def threshold_counts(features: FeatureCache, batches: Iterable[EpisodeBatch]) -> ThresholdCounts:
    """Judge every threshold on the episodes, at training size, pixels labelled 255 left out."""
    class_ids: list[int] = []
    counts: list[Tensor] = []
    for batch in batches:
        cosine = prototype_cosine(*features.of(batch), batch)
        size = (batch.query_masks.shape[-2], batch.query_masks.shape[-1])
        counts.append(_of_all_thresholds(resize(cosine[:, None], size)[:, 0], batch.query_masks))
        class_ids += batch.class_ids
    both = torch.cat(counts, dim=2).cpu().numpy()
    return ThresholdCounts(Counts(both[0], both[1]), np.array(class_ids, dtype=np.int64))


def _of_all_thresholds(
    cosine: Float[Tensor, "b H W"], truth: UInt8[Tensor, "b H W"]
) -> Int64[Tensor, "2 thresholds b 2"]:
    """`count_pixels` of the cosine above each threshold, from one histogram per episode instead of a mask each."""
    b, bins = len(cosine), len(THRESHOLDS) + 1
    thresholds = torch.tensor(THRESHOLDS, dtype=cosine.dtype, device=cosine.device)
    # A pixel's bin is how many thresholds it exceeds.
    place = torch.bucketize(cosine, thresholds) + bins * (truth == 1)
    place += 2 * bins * torch.arange(b, device=cosine.device)[:, None, None]
    pixels = torch.bincount(place[truth != IGNORE_INDEX], minlength=2 * bins * b).view(b, 2, bins)
    below = pixels.cumsum(-1)[:, :, :-1]
    total = pixels.sum(-1, keepdim=True)
    above = total - below
    (ground_below, object_below), (ground_above, object_above) = below.unbind(1), above.unbind(1)
    ground, thing = total.unbind(1)
    intersection = torch.stack([ground_below, object_above], dim=-1)
    union = torch.stack([ground + object_below, thing + ground_above], dim=-1)
    return torch.stack([intersection, union]).transpose(1, 2)


def best_threshold(features: FeatureCache, batches: Iterable[EpisodeBatch], classes: Sequence[int]) -> float:
    """The single threshold with the highest mIoU on these episodes (of base classes, so that nothing leaks)."""
    return threshold_counts(features, batches).best(classes)
