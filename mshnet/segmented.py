"""What a segmenter gives: probabilities per class at the picture's own size, and the rule that makes labels of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt16
from torch import Tensor

from mshnet.errors import InputError

BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))


@dataclass(frozen=True, eq=False)
class Segmented:
    """A picture segmented by n learned classes, at its own size."""

    classes: tuple[str, ...]
    probabilities: Float32[np.ndarray, "n H W"]
    """Of each class against everything else, 0..1; 0.5 or more exactly where the foreground logit is the larger one.
    Each class is judged by itself, so they need not add up to 1."""
    thresholds: tuple[float, ...]
    """Of each class, 0..1."""

    @functools.cached_property
    def labels(self) -> UInt16[np.ndarray, "H W"]:
        """i + 1 where class i is; 0, background, where no class's probability is at or above its own threshold.

        Where several are, the most probable of them; of equal ones the first.
        """
        best = np.full(self.probabilities.shape[1:], -1, dtype=np.float32)
        labels = np.zeros(best.shape, dtype=np.uint16)
        for i, (probability, threshold) in enumerate(zip(self.probabilities, self.thresholds, strict=True)):
            # In float32, as the probabilities are: a threshold of 0.7 is to include the float32 of 0.7.
            wins = (probability >= np.float32(threshold)) & (probability > best)
            labels[wins] = i + 1
            best[wins] = probability[wins]
        return labels

    @property
    def mask(self) -> Bool[np.ndarray, "H W"]:
        """Where any class is."""
        return np.asarray(self.labels > 0)

    def mask_of(self, name: str) -> Bool[np.ndarray, "H W"]:
        """Where a class is: the pixels that `labels` gives to it. Raises InputError for a class not asked for."""
        if name not in self.classes:
            raise InputError(f"expected one of the classes {', '.join(self.classes)}, got {name!r}")
        return np.asarray(self.labels == self.classes.index(name) + 1)


def probability(difference: Float[Tensor, "H W"]) -> Float[Tensor, "H W"]:
    """The softmax's foreground, 0..1, from the foreground's logit less the background's.

    0.5 or more exactly where that is above 0: rounding alone would give 0.5 to both sides of it, and a tie is
    background, as in evaluation. One class at a time: what a vector unit computes and what is left over at a tensor's
    end differ in the last bit, so several together would not have the bits of each alone.
    """
    found = torch.sigmoid(difference)
    return torch.where(difference > 0, found.clamp(min=0.5), found.clamp(max=BELOW_HALF))
