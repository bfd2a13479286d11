"""A second trainable model: prototype alignment in the manner of PANet (Wang et al., ICCV 2019), our own code.

The paper's sections 3.3 (prototypes by masked average pooling), 3.4 (labels by the distance to them) and 3.5
(prototype alignment). What differs from its PANet:

- The backbone is frozen, as MSHNet's is, and what is learnt is a linear map of its features, where the paper
  fine-tunes a VGG-16. So both models see the same features, and the pipeline's caches hold for both.
- The features are those of levels 3 and 4, joined at level 3's size (1/8 of the image's, as the paper's): with a
  frozen backbone the middle levels generalise better to new classes than the last (CANet, Zhang et al., CVPR 2019).
- A support's mask is brought to the features' size (each position weighs as much as it shows of the object), not the
  features to the mask's: the same pooling of features that are constant over a position, in much less memory.
- Losses read logits at twice level 3's size, as MSHNet's, not at the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mshnet.backbone import Features
from mshnet.config import ModelConfig
from mshnet.masking import resize
from mshnet.model import FewShotModel, Prediction
from mshnet.profiling import region

EMBEDDING_CHANNELS = 256
SCALE = 20.0
"""Of the cosines before the softmax (section 3.4: 20; learning it gained little)."""
ALIGNMENT_WEIGHT = 1.0
"""Of the alignment loss (section 3.5: 1)."""


class PANet(FewShotModel):
    """Each position of the query is what the nearer prototype is: 393,472 learnable parameters with ResNet-50."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.relation = PrototypeAlignment(self.backbone.channels)


@dataclass(frozen=True, eq=False)
class KeptPrototypes:
    """One support's: all that is needed of it."""

    prototypes: Float[Tensor, "1 1 2 d"]

    @property
    def nbytes(self) -> int:
        """2 KiB in float32, whatever the image."""
        return self.prototypes.nbytes


class PrototypeAlignment(nn.Module):
    """Everything learnable: one linear map per level, the sum of which is the embedding."""

    def __init__(self, channels: dict[int, int]) -> None:
        super().__init__()
        self.level3 = nn.Conv2d(channels[3], EMBEDDING_CHANNELS, 1)
        self.level4 = nn.Conv2d(channels[4], EMBEDDING_CHANNELS, 1, bias=False)

    def embed(self, features: Features) -> Float[Tensor, "n d h3 w3"]:
        """The last maps of levels 3 and 4, at level 3's size."""
        fine: Tensor = self.level3(torch.relu(features.level3[:, -1]))
        return fine + resize(self.level4(torch.relu(features.level4[:, -1])), (fine.shape[-2], fine.shape[-1]))

    def forward(self, query: Features, support: Features, masks: Float[Tensor, "b k H W"]) -> Prediction:
        """Segment the queries. The image size is that of the masks.

        In training the alignment loss comes with it.
        """
        with region("similarity"):
            # From here on in the masks' precision, whatever the maps' under autocast: it costs little.
            queries = self.embed(query).to(masks.dtype)
            supports = self.embed(support).to(masks.dtype).unflatten(0, masks.shape[:2])
            with torch.autocast(masks.device.type, enabled=False):
                return self._compared(queries, supports, masks)

    def remember(self, support: Features, mask: Float[Tensor, "1 1 H W"]) -> KeptPrototypes:
        """What `recall` needs of one support."""
        embedded = self.embed(support).to(mask.dtype)
        with torch.autocast(mask.device.type, enabled=False):
            weights = shares(mask, (embedded.shape[-2], embedded.shape[-1]))
            return KeptPrototypes(pooled(embedded[:, None], weights))

    def recall(self, query: Features, supports: Sequence[KeptPrototypes], size: tuple[int, int]) -> Prediction:
        """What `forward` gives for b queries and these k supports, the same for all; `size` is the image's, px."""
        of = torch.cat([support.prototypes for support in supports], dim=1).mean(1)
        queries = self.embed(query).to(of.dtype)
        with torch.autocast(of.device.type, enabled=False):
            logits = cosine_logits(queries, of.expand(len(queries), -1, -1))
            return Prediction(resize(logits, (2 * logits.shape[-2], 2 * logits.shape[-1])), (), size=size)

    def _compared(
        self, queries: Float[Tensor, "b d h w"], supports: Float[Tensor, "b k d h w"], masks: Float[Tensor, "b k H W"]
    ) -> Prediction:
        height, width = queries.shape[-2:]
        size = (2 * height, 2 * width)
        logits = cosine_logits(queries, prototypes(supports, shares(masks, (height, width))))
        auxiliary: tuple[Tensor, ...] = ()
        if self.training:
            truth = (F.interpolate(masks, size=size, mode="nearest") == 1).long()
            auxiliary = (ALIGNMENT_WEIGHT * alignment_loss(queries, logits, supports, truth),)
        return Prediction(resize(logits, size), (), size=(masks.shape[-2], masks.shape[-1]), auxiliary=auxiliary)


def shares(masks: Float[Tensor, "b k H W"], size: tuple[int, int]) -> Float[Tensor, "b k 2 h w"]:
    """How much each position shows of the background and of the object, 0..1."""
    shown = F.interpolate(masks, size=size, mode="area")
    return torch.stack([1 - shown, shown], dim=2)


def prototypes(embedded: Float[Tensor, "b k d h w"], weights: Float[Tensor, "b k 2 h w"]) -> Float[Tensor, "b 2 d"]:
    """Background's and foreground's: the mean over the images of what `pooled` gives.

    An image without weight counts as zeros: it shortens a prototype, of which only the direction matters.
    """
    return pooled(embedded, weights).mean(1)


def pooled(embedded: Float[Tensor, "b k d h w"], weights: Float[Tensor, "b k 2 h w"]) -> Float[Tensor, "b k 2 d"]:
    """Each image's background and foreground: the weighted mean over its positions."""
    total = torch.einsum("bkdhw,bkphw->bkpd", embedded, weights)
    return total / weights.sum((-2, -1)).clamp(min=1e-5).unsqueeze(-1)


def cosine_logits(embedded: Float[Tensor, "b d h w"], of: Float[Tensor, "b 2 d"]) -> Float[Tensor, "b 2 h w"]:
    """Scaled cosines to both prototypes, -20..20; 0 to a prototype of zeros: there was no object."""
    # eps: the gradient of a normalised zero vector would else be 1e12, and meet a zero only later.
    cosines: Tensor = torch.einsum("bdhw,bpd->bphw", F.normalize(embedded, dim=1), F.normalize(of, dim=2, eps=1e-6))
    return SCALE * cosines


def alignment_loss(
    queries: Float[Tensor, "b d h w"],
    logits: Float[Tensor, "b 2 h w"],
    supports: Float[Tensor, "b k d h w"],
    truth: Int64[Tensor, "b k i j"],
) -> Float[Tensor, ""]:
    """The supports' cross-entropy when the query, with its predicted mask, teaches what the class is.

    truth: 1 for the object, 0 for background, at the size at which the logits are judged. An episode whose prediction
    has no foreground adds 0 (as the published code's), and counts.
    """
    shots = supports.shape[1]
    foreground = logits[:, 1] > logits[:, 0]
    weights = torch.stack([~foreground, foreground], dim=1).to(queries.dtype)
    taught = prototypes(queries.unsqueeze(1), weights.unsqueeze(1))
    of_supports = cosine_logits(supports.flatten(0, 1), taught.repeat_interleave(shots, dim=0))
    resized = resize(of_supports, (truth.shape[-2], truth.shape[-1]))
    losses = F.cross_entropy(resized, truth.flatten(0, 1), reduction="none")
    of_episodes = losses.mean((1, 2)).reshape(-1, shots).mean(1)
    return (of_episodes * foreground.flatten(1).any(1)).mean()
