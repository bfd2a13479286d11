"""Every test episode's counts as a table: what statistics, comparisons and galleries are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from mshnet.metrics import Counts


@dataclass(frozen=True)
class Outcomes:
    """One way of segmenting on n episodes, in order."""

    counts: Counts
    """Arrays of shape (n, 2)."""
    class_ids: Int64[np.ndarray, " n"]
    object_px: Int64[np.ndarray, " n"]
    """Of the true object that count."""
    counted_px: Int64[np.ndarray, " n"]
    """Of the query that count: all but the ignored."""

    def __len__(self) -> int:
        return len(self.class_ids)
