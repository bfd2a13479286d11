"""What is kept of a class's supports, so that a query needs no pass of them through the backbone.

A relation that can say what it needs of a support has `remember` and `recall`, and gets back what it kept; of others
the whole features are kept. One support at a time, so that memory is bounded by what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mshnet.backbone import Features
from mshnet.model import Prediction


@runtime_checkable
class Remembering(Protocol):
    """A relation that keeps less of a support than its features."""

    def remember(self, support: Features, mask: Float[Tensor, "1 1 H W"]) -> Any:
        """What is needed of one support: anything with `nbytes`."""

    def recall(self, query: Features, supports: Sequence[Any], size: tuple[int, int]) -> Prediction:
        """What `forward` gives for b queries and the supports that were remembered, in eval mode."""


@dataclass(frozen=True)
class WholeSupport:
    """A support as it came from the backbone."""

    features: Features
    mask: Float[Tensor, "1 1 H W"]

    @property
    def nbytes(self) -> int:
        """Of the features and the mask."""
        return sum(maps.nbytes for maps in self.features) + self.mask.nbytes


def remember(relation: nn.Module, support: Features, mask: Float[Tensor, "1 1 H W"]) -> Any:
    """What is to be kept of one support: its features (n = 1) and its mask of 0 and 1."""
    return relation.remember(support, mask) if isinstance(relation, Remembering) else WholeSupport(support, mask)


def recall(relation: nn.Module, query: Features, supports: Sequence[Any], size: tuple[int, int]) -> Prediction:
    """The relation's prediction for b queries, from k supports that `remember` kept. `size` is the image's, in px."""
    if isinstance(relation, Remembering):
        return relation.recall(query, supports, size)
    b = len(query.level3)
    masks = torch.cat([support.mask for support in supports], dim=1).expand(b, -1, -1, -1)
    levels = zip(*(support.features for support in supports), strict=True)
    prediction: Prediction = relation(query, Features(*(torch.cat([*maps] * b) for maps in levels)), masks)
    return prediction
