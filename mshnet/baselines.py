"""What a trained model must beat: foreground everywhere, and a threshold on the cosine to the prototype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mshnet.backbone import Features
from mshnet.data.batches import EpisodeBatch
from mshnet.engine import Predictor
from mshnet.features import FeatureCache
from mshnet.masking import mask_pyramid, resize
from mshnet.metrics import Counts, episode_counts, miou, sum_by_class

THRESHOLDS = tuple(float(x) for x in np.arange(-20, 100) / 100)
"""Cosines tried as the threshold."""


def foreground(query: Features, support: Features, batch: EpisodeBatch) -> Bool[Tensor, "b H W"]:
    """Everything is foreground."""
    return torch.ones_like(batch.query_masks, dtype=torch.bool)


def prototype_cosine(query: Features, support: Features, batch: EpisodeBatch) -> Float[Tensor, "b H W"]:
    """Cosine between each query position and the object's mean feature over all shots, -1..1.

    Features are the last map of level 4 (torchvision's layer3), of any precision, in float32 from here on;
    nothing is trained.
    """
    masks = batch.support_masks.float()
    queries = torch.relu(query.level4[:, -1].float())
    supports = torch.relu(support.level4[:, -1].float()).unflatten(0, masks.shape[:2])
    size = (queries.shape[-2], queries.shape[-1])
    (soft,) = mask_pyramid(masks, (size,))
    prototype = torch.einsum("bkchw,bkhw->bc", supports, soft)
    cosine = F.cosine_similarity(queries, prototype[:, :, None, None], dim=1)
    return resize(cosine[:, None], (masks.shape[-2], masks.shape[-1]))[:, 0]


def prototype_threshold(threshold: float) -> Predictor:
    """Foreground is where the cosine to the prototype exceeds the threshold."""

    def predict(query: Features, support: Features, batch: EpisodeBatch) -> Bool[Tensor, "b H W"]:
        return prototype_cosine(query, support, batch) > threshold

    return predict


@torch.no_grad()
def best_threshold(features: FeatureCache, batches: Iterable[EpisodeBatch], classes: Sequence[int]) -> float:
    """The single threshold with the highest mIoU on these episodes (of base classes, so that nothing leaks)."""
    class_ids: list[int] = []
    counts: list[list[Counts]] = [[] for _ in THRESHOLDS]
    for batch in batches:
        cosine = prototype_cosine(*features.of(batch), batch)
        class_ids += batch.class_ids
        for i, threshold in enumerate(THRESHOLDS):
            counts[i].append(episode_counts(cosine > threshold, batch.query_masks))
    scores = [
        miou(
            sum_by_class(
                Counts(
                    np.concatenate([part.intersection for part in parts]),
                    np.concatenate([part.union for part in parts]),
                ),
                class_ids,
                classes,
            )
        )
        for parts in counts
    ]
    return THRESHOLDS[int(np.argmax(scores))]
