"""The best threshold, against counting by hand."""

from __future__ import annotations

import torch

from mshnet.calibration import THRESHOLDS, best_threshold, counts_by_threshold
from mshnet.segmented import probability


def test_counts_are_those_of_each_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(0, 101, (20, 30), generator=generator) / 100  # many lie exactly on a threshold
    truth = torch.randint(0, 2, (20, 30), generator=generator, dtype=torch.uint8)
    counts = counts_by_threshold(found, truth)
    for i, threshold in enumerate(THRESHOLDS):
        mask = found >= torch.tensor(threshold)
        assert counts[0, i] == (mask & (truth == 1)).sum()
        assert counts[1, i] == (mask | (truth == 1)).sum()


def test_the_best_and_of_equal_ones_the_nearest_to_a_half() -> None:
    truth = torch.tensor([[1, 1, 0, 0]], dtype=torch.uint8)
    assert best_threshold(counts_by_threshold(torch.tensor([[0.9, 0.8, 0.2, 0.1]]), truth)) == 0.5
    assert best_threshold(counts_by_threshold(torch.tensor([[0.9, 0.8, 0.7, 0.1]]), truth)) == 0.71
    assert best_threshold(counts_by_threshold(torch.tensor([[0.4, 0.3, 0.2, 0.1]]), truth)) == 0.3


def test_a_half_is_reached_exactly_by_the_larger_foreground() -> None:
    lead = torch.tensor([[-1e-30, 0.0, 1e-30, -1e-9, 1e-9, -50.0, 50.0, -1e4, 1e4]])
    found = probability(lead)
    assert torch.equal(found >= 0.5, lead > 0)
    assert (found - torch.sigmoid(lead)).abs().max() < 1e-7
