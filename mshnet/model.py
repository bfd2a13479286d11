"""MSHNet: backbone, two similarities, three merging blocks, one inverted pyramid (paper, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mshnet.backbone import LEVELS, Backbone, Features
from mshnet.config import ModelConfig
from mshnet.decoder import InvertedPyramid
from mshnet.errors import InputError
from mshnet.kernels.cosine import ObjectVectors, gathered, mean_cosine_of
from mshnet.masking import mask_pyramid, prototypes, resize, select_object
from mshnet.merging import SymmetricMergingBlock
from mshnet.profiling import region
from mshnet.similarity import GenerativePrototypeSimilarity, cosine_similarity

Maps = dict[int, Float[Tensor, "b k l h w"]]


@dataclass(frozen=True)
class Similarities:
    """Similarity maps in 0..1 per level (keys 3, 4, 5); None where the configuration leaves one out."""

    cosine: Maps | None
    prototype: Maps | None


@dataclass(frozen=True)
class Prediction:
    """Background and foreground logits of the query."""

    logits_low: Float[Tensor, "b 2 _ _"]
    """Before the last resize, at twice level 3's size: what the loss reads."""
    inner_logits: tuple[Float[Tensor, "b 2 _ _"], ...]
    """Of levels 5, 4, 3, each at its own size (level 5's at level 4's)."""
    size: tuple[int, int]
    """The image's height and width."""
    auxiliary: tuple[Float[Tensor, ""], ...] = ()
    """Further losses of the model's own, weighted, to be added to the training loss: means over the batch's episodes,
    so that shares of a batch add up. None in eval mode."""

    @property
    def logits(self) -> Float[Tensor, "b 2 H W"]:
        """At the image size; the mask is their argmax. Resized when asked for: training never does."""
        return resize(self.logits_low, self.size)


@dataclass(frozen=True, eq=False)
class KeptSupport:
    """All that is needed of one support, per level (keys 3, 4, 5); empty where the configuration leaves it out."""

    objects: dict[int, ObjectVectors]
    prototypes: dict[int, Float[Tensor, "1 1 l c"]]

    @property
    def nbytes(self) -> int:
        """Of the numbers: with both similarities in proportion to the object's share of the image."""
        objects = sum(level.features.nbytes + level.soft.nbytes for level in self.objects.values())
        return objects + sum(level.nbytes for level in self.prototypes.values())


class RelationNetwork(nn.Module):
    """Everything learnable: from the features of query and supports to logits."""

    def __init__(self, config: ModelConfig, layers: dict[int, int], channels: dict[int, int]) -> None:
        super().__init__()
        self.similarity = config.similarity
        if config.similarity != "cosine":
            self.gps = nn.ModuleDict({str(v): GenerativePrototypeSimilarity(channels[v]) for v in LEVELS})
        self.merging = nn.ModuleDict(
            {str(v): SymmetricMergingBlock(layers[v], config.similarity, config.dropout) for v in LEVELS}
        )
        self.pyramid = InvertedPyramid(config.dropout)

    def similarities(self, query: Features, support: Features, masks: Float[Tensor, "b k H W"]) -> Similarities:
        """Both similarities on all layers. Support features are those of b*k images, episode by episode."""
        sizes = tuple((maps.shape[-2], maps.shape[-1]) for maps in query)
        cosine: Maps = {}
        prototype: Maps = {}
        for level, q, s, soft in zip(LEVELS, query, support, mask_pyramid(masks, sizes), strict=True):
            objects = select_object(s.unflatten(0, masks.shape[:2]), soft)
            if self.similarity != "prototype":
                cosine[level] = cosine_similarity(q, objects)
            if self.similarity != "cosine":
                prototype[level] = self.gps[str(level)](q, prototypes(objects))
        return Similarities(cosine=cosine or None, prototype=prototype or None)

    def forward(self, query: Features, support: Features, masks: Float[Tensor, "b k H W"]) -> Prediction:
        """Segment the queries. The image size is that of the masks."""
        with region("similarity"):
            maps = self.similarities(query, support, masks)
        return self._predicted(maps, (masks.shape[-2], masks.shape[-1]))

    def remember(self, support: Features, mask: Float[Tensor, "1 1 H W"]) -> KeptSupport:
        """What `recall` needs of one support: its features at the object's positions, and its prototypes."""
        objects: dict[int, ObjectVectors] = {}
        kept: dict[int, Tensor] = {}
        sizes = tuple((maps.shape[-2], maps.shape[-1]) for maps in support)
        for level, maps, soft in zip(LEVELS, support, mask_pyramid(mask, sizes), strict=True):
            chosen = select_object(maps[:, None], soft)
            if self.similarity != "prototype":
                objects[level] = gathered(maps[0].flatten(2), chosen.soft_mask[0, 0], chosen.is_object[0, 0])
            if self.similarity != "cosine":
                kept[level] = prototypes(chosen)
        return KeptSupport(objects, kept)

    def recall(self, query: Features, supports: Sequence[KeptSupport], size: tuple[int, int]) -> Prediction:
        """What `forward` gives for b queries and these k supports, the same for all; `size` is the image's, px."""
        cosine: Maps = {}
        prototype: Maps = {}
        with region("similarity"):
            for level, maps in zip(LEVELS, query, strict=True):
                if self.similarity != "prototype":
                    found = mean_cosine_of(maps.flatten(3), [support.objects[level] for support in supports])
                    cosine[level] = found.unflatten(-1, maps.shape[3:])
                if self.similarity != "cosine":
                    of_level = torch.cat([support.prototypes[level] for support in supports], dim=1)
                    prototype[level] = self.gps[str(level)](maps, of_level.expand(len(maps), -1, -1, -1))
        return self._predicted(Similarities(cosine=cosine or None, prototype=prototype or None), size)

    def _predicted(self, maps: Similarities, size: tuple[int, int]) -> Prediction:
        with region("merging"):
            logits_low, inner_logits = self.pyramid(*self._merged(maps))
        return Prediction(logits_low, inner_logits, size=size)

    def _merged(self, maps: Similarities) -> list[Float[Tensor, "b c h w"]]:
        return [
            self.merging[str(level)](
                maps.cosine[level] if maps.cosine else None,
                maps.prototype[level] if maps.prototype else None,
            )
            for level in LEVELS
        ]


class FewShotModel(nn.Module):
    """Given k labelled supports of a class, find the class in a query image: a frozen backbone, a learnt relation.

    `backbone` stays in eval mode; `relation` holds every learnable parameter and goes from the features of b queries
    and b*k supports, and the supports' masks, to a Prediction. It is all that a subclass adds (docs/models.md).
    Building one downloads nothing.
    """

    relation: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone)

    def forward(
        self,
        query_images: Float[Tensor, "b 3 H W"],
        support_images: Float[Tensor, "b k 3 H W"],
        support_masks: Float[Tensor, "b k H W"],
    ) -> Prediction:
        """Logits of the query masks.

        Images are normalised (RGB in 0..1, ImageNet mean and deviation), masks 0 or 1. An empty
        support mask is allowed. Raises InputError when the shapes disagree.
        """
        query, support = self._features(query_images, support_images, support_masks)
        prediction: Prediction = self.relation(query, support, support_masks)
        return prediction

    def _features(self, queries: Tensor, supports: Tensor, masks: Tensor) -> tuple[Features, Features]:
        b, k = supports.shape[:2]
        if queries.shape != (b, *supports.shape[2:]) or masks.shape != (b, k, *queries.shape[-2:]) or k == 0:
            raise InputError(
                "expected query images (B,3,H,W), support images (B,K,3,H,W) and support masks (B,K,H,W) with K of "
                f"1 or more, found {tuple(queries.shape)}, {tuple(supports.shape)} and {tuple(masks.shape)}"
            )
        # One call for all images of the episodes: the backbone is most of the work.
        features = self.backbone(torch.cat([queries, supports.flatten(0, 1)]))
        return Features(*(maps[:b] for maps in features)), Features(*(maps[b:] for maps in features))


class MSHNet(FewShotModel):
    """Few-shot segmentation by hyperrelations: 29,626,952 learnable parameters with ResNet-50 and both similarities."""

    relation: RelationNetwork

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.relation = RelationNetwork(config, self.backbone.layers, self.backbone.channels)

    def similarities(
        self,
        query_images: Float[Tensor, "b 3 H W"],
        support_images: Float[Tensor, "b k 3 H W"],
        support_masks: Float[Tensor, "b k H W"],
    ) -> Similarities:
        """The similarity maps that the merging blocks read (the paper's energy maps are their means)."""
        query, support = self._features(query_images, support_images, support_masks)
        return self.relation.similarities(query, support, support_masks)
