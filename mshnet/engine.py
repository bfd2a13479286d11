"""One training step, and evaluation. Knows nothing of where it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mshnet.backbone import Features
from mshnet.data.batches import EpisodeBatch
from mshnet.features import FeatureCache
from mshnet.loss import Losses, segmentation_loss
from mshnet.metrics import Counts, episode_counts
from mshnet.model import Prediction

Relation = Callable[[Features, Features, Tensor], Prediction]
"""`MSHNet.relation`, bare or wrapped for data-parallel training."""

Predictor = Callable[[Features, Features, EpisodeBatch], Bool[Tensor, "b H W"]]
"""Anything that segments a batch from its features: the network, an untrained one, a baseline."""


def train_step(
    relation: Relation,
    features: FeatureCache,
    batch: EpisodeBatch,
    optimizer: torch.optim.Optimizer,
    inner_weight: float,
) -> Losses:
    """One update. Raises FloatingPointError, before the weights are touched, when the loss is not finite."""
    query, support = features.of(batch)
    prediction = relation(query, support, batch.support_masks.float())
    losses = segmentation_loss(prediction, batch.query_masks, inner_weight)
    if not torch.isfinite(losses.total):
        raise FloatingPointError(
            f"the loss is {losses.total.item()} for queries {batch.query_rows} of classes {batch.class_ids}"
        )
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    optimizer.step()
    return Losses(*(loss.detach() for loss in losses))


def network_predictor(relation: Relation) -> Predictor:
    """The mask is where the foreground logit is the larger one."""

    def predict(query: Features, support: Features, batch: EpisodeBatch) -> Bool[Tensor, "b H W"]:
        logits = relation(query, support, batch.support_masks.float()).logits
        return logits[:, 1] > logits[:, 0]

    return predict


@dataclass(frozen=True)
class Evaluation:
    """Counts of every episode, in order: arrays of shape (episodes, 2), background and foreground."""

    counts: Counts
    class_ids: tuple[int, ...]


@torch.no_grad()
def evaluate(
    predictors: Mapping[str, Predictor], features: FeatureCache, batches: Iterable[EpisodeBatch]
) -> dict[str, Evaluation]:
    """Judge several predictors on the same episodes; the features are computed once for all of them."""
    counts: dict[str, list[Counts]] = {name: [] for name in predictors}
    class_ids: list[int] = []
    for batch in batches:
        query, support = features.of(batch)
        class_ids += batch.class_ids
        for name, predict in predictors.items():
            counts[name].append(episode_counts(predict(query, support, batch), batch.query_masks))
    return {
        name: Evaluation(
            Counts(
                np.concatenate([part.intersection for part in parts]),
                np.concatenate([part.union for part in parts]),
            ),
            tuple(class_ids),
        )
        for name, parts in counts.items()
    }
