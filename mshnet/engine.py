"""One training step, and evaluation. Knows nothing of where it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mshnet.backbone import Features
from mshnet.config import TrainingConfig
from mshnet.data.batches import EpisodeBatch
from mshnet.features import FeatureCache
from mshnet.judging import Judging, Segmentation
from mshnet.loss import segmentation_loss
from mshnet.metrics import count_pixels, fetched, truth_pixels
from mshnet.model import Prediction
from mshnet.outcomes import Outcomes
from mshnet.parallel import Share, rank_and_world, set_share
from mshnet.profiling import region

Relation = Callable[[Features, Features, Tensor], Prediction]
"""`MSHNet.relation`, bare or wrapped for data-parallel training."""

Predictor = Callable[[Features, Features, EpisodeBatch], Segmentation]
"""Anything that segments a batch from its features (queries', supports'): the network, an untrained one, a baseline."""

SQUARE = Judging()
"""At training size, ignored pixels left out."""


@dataclass(frozen=True)
class Part:
    """Episodes that go through the network together and share batch statistics, as one process sees them."""

    batch: EpisodeBatch
    """This process's episodes, on its device."""
    share: Share
    """Which of the part's episodes they are."""


@dataclass(frozen=True)
class Update:
    """What one update gave; the same bits on all processes, on the device."""

    losses: Float[Tensor, " 3"]
    """Total, outer and inner: means over the global batch."""
    finite: Bool[Tensor, ""]
    """False where the loss or a gradient was not finite: weights and momentum are untouched on all processes.

    The running statistics of batch norm are not: the state is good for nothing but to be thrown away.
    """


def make_optimizer(parameters: Iterable[nn.Parameter], training: TrainingConfig) -> torch.optim.SGD:
    """Fused SGD, with the momentum that it begins with already in place.

    Zeros give the first update the bits that none would, and an update that is skipped leaves them so.
    """
    optimizer = torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        fused=True,
    )
    if training.momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def train_step(
    relation: Relation,
    features: FeatureCache,
    parts: Iterable[Part],
    optimizer: torch.optim.Optimizer,
    inner_weight: float,
    seed: int,
    stopped: Bool[Tensor, ""] | None = None,
) -> Update:
    """One update: the mean loss over the episodes of all parts and processes, one step of the optimizer.

    All processes call it with their shares of the same parts. `relation` is a module or holds one as
    `.module`; with several processes there must be a DistributedDataParallel in it. The optimizer is fused, as
    `make_optimizer`'s; `seed` is that of the update's dropout. Where `stopped` (on the device, the same on all
    processes) is True, weights and momentum are left alone as well: an earlier update was not finite. The device
    is never waited for.
    """
    parts = tuple(parts)
    episodes = sum(part.share.total for part in parts)
    network = _network(relation)
    torch.manual_seed(seed)
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for i, part in enumerate(parts):
        set_share(network, part.share)
        with _gradients_stay_here(network) if i + 1 < len(parts) else nullcontext():
            losses.append(_backward(relation, features, part, inner_weight, episodes))
    mean = torch.stack(losses).sum(0)
    if rank_and_world()[1] > 1:
        with region("communication"):
            distributed.all_reduce(mean)
    with region("optimizer"):
        return Update(mean, _step(optimizer, mean, stopped))


def _backward(
    relation: Relation, features: FeatureCache, part: Part, inner_weight: float, episodes: int
) -> Float[Tensor, " 3"]:
    """Add a part's gradients; returns its losses as this process's addends of the mean over all `episodes`."""
    # No names for the features: the backward pass needs the queries' alone, and the supports' are as large.
    prediction = relation(*features.of(part.batch), part.batch.support_masks.float())
    with region("loss"):
        losses = segmentation_loss(prediction, part.batch.query_masks, inner_weight)
        fraction = len(part.share) / episodes
    with region("backward"):
        # DDP takes the mean over the processes, where the sum is wanted.
        (losses.total * (fraction * rank_and_world()[1])).backward()
    return fraction * torch.stack([loss.detach() for loss in losses])


def _step(
    optimizer: torch.optim.Optimizer, losses: Float[Tensor, " 3"], stopped: Bool[Tensor, ""] | None
) -> Bool[Tensor, ""]:
    """Step unless a loss or a gradient is not finite, or training has stopped; returns whether they are finite.

    Decided on the device, so that nobody waits for it.
    """
    gradients = [x.grad for group in optimizer.param_groups for x in group["params"] if x.grad is not None]
    finite = torch.isfinite(losses).all() & torch.isfinite(nn.utils.get_total_norm(gradients))
    skipped = ~finite if stopped is None else ~finite | stopped
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]  # the fused kernel's own switch
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    return finite


def _network(relation: Relation) -> nn.Module:
    network = relation if isinstance(relation, nn.Module) else getattr(relation, "module", None)
    if not isinstance(network, nn.Module):
        raise TypeError(f"expected a module, or a wrapper that holds one as .module, found {type(relation).__name__}")
    return network


def _gradients_stay_here(network: nn.Module) -> AbstractContextManager[None]:
    # Summed over the processes once, with the last part's.
    for module in network.modules():
        if isinstance(module, DistributedDataParallel):
            return module.no_sync()
    return nullcontext()


def network_predictor(relation: Relation) -> Predictor:
    """The mask is where the foreground logit is the larger one."""

    def predict(query: Features, support: Features, batch: EpisodeBatch) -> Segmentation:
        return Segmentation(relation(query, support, batch.support_masks.float()).logits_low)

    return predict


@torch.no_grad()
def evaluate(
    predictors: Mapping[str, Predictor],
    features: FeatureCache,
    batches: Iterable[EpisodeBatch],
    judging: Judging = SQUARE,
) -> dict[str, Outcomes]:
    """Judge several predictors on the same episodes; the features are computed once for all of them.

    Outcomes are in the episodes' order. The device is waited for once, at the end.
    """
    counts: dict[str, list[Tensor]] = {name: [] for name in predictors}
    pixels: list[Tensor] = []
    class_ids: list[int] = []
    for batch in batches:
        query, support = features.of(batch)
        truth = judging.truth(batch)
        class_ids += batch.class_ids
        pixels += [truth_pixels(masks) for masks in truth]
        for name, predict in predictors.items():
            counts[name] += _counted(predict(query, support, batch), truth)
    object_px, counted_px = torch.cat(pixels, dim=1).cpu().numpy()
    ids = np.array(class_ids, dtype=np.int64)
    return {
        name: Outcomes(fetched(torch.cat(parts, dim=1)), ids, object_px, counted_px) for name, parts in counts.items()
    }


def _counted(found: Segmentation, truth: Sequence[UInt8[Tensor, "_ _ _"]]) -> list[Tensor]:
    parts = [found] if len(truth) == 1 else [found.episode(i) for i in range(len(truth))]
    return [count_pixels(part.masks(_size(mask)), mask) for part, mask in zip(parts, truth, strict=True)]


def _size(masks: Tensor) -> tuple[int, int]:
    return masks.shape[-2], masks.shape[-1]
