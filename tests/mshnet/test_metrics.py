"""The metric against a confusion matrix counted pixel by pixel in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mshnet.metrics import Counts, class_iou, episode_counts, fb_iou, miou, sum_by_class, truth_pixels

CLASSES = (3, 7, 11)
Grid = list[list[int]]
Episodes = list[tuple[int, Grid, Grid]]
"""Class, prediction (0 or 1) and truth (0, 1 or 255) of each episode."""


@st.composite
def episode_lists(draw: st.DrawFn) -> Episodes:
    """Up to 6 episodes of one size, of some of the classes; empty and full masks come up often."""
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def grid(values: Sequence[int]) -> st.SearchStrategy[Grid]:
        mixed = st.lists(
            st.lists(st.sampled_from(values), min_size=width, max_size=width), min_size=height, max_size=height
        )
        return st.one_of(mixed, *(st.just([[value] * width] * height) for value in values))

    one = st.tuples(st.sampled_from(CLASSES), grid((0, 1)), grid((0, 1, 255)))
    return draw(st.lists(one, min_size=1, max_size=6))


def confusion(predicted: Grid, truth: Grid) -> list[list[int]]:
    """[truth][prediction] -> pixels, those labelled 255 left out."""
    matrix = [[0, 0], [0, 0]]
    for predicted_row, true_row in zip(predicted, truth, strict=True):
        for p, t in zip(predicted_row, true_row, strict=True):
            if t != 255:
                matrix[t][p] += 1
    return matrix


def tensors(episodes: Episodes) -> tuple[Tensor, Tensor]:
    predicted = torch.tensor([p for _, p, _ in episodes], dtype=torch.bool)
    return predicted, torch.tensor([t for _, _, t in episodes], dtype=torch.uint8)


def per_class(episodes: Episodes) -> Counts:
    return sum_by_class(episode_counts(*tensors(episodes)), [c for c, _, _ in episodes], CLASSES)


@settings(max_examples=150, deadline=None)
@given(episode_lists())
@example([(3, [[0, 0]], [[1, 255]])])  # nothing predicted
@example([(3, [[1, 1]], [[0, 255]])])  # no object
@example([(3, [[0, 0]], [[0, 255]]), (7, [[0, 1]], [[255, 255]])])  # neither; nothing that counts
def test_against_a_confusion_matrix(episodes: Episodes) -> None:
    total = {c: [[0, 0], [0, 0]] for c in CLASSES}
    counts = episode_counts(*tensors(episodes))
    objects, counted = truth_pixels(tensors(episodes)[1]).tolist()
    for i, (class_id, predicted, truth) in enumerate(episodes):
        matrix = confusion(predicted, truth)
        assert (objects[i], counted[i]) == (sum(matrix[1]), sum(map(sum, matrix)))
        for k in (0, 1):
            assert counts.intersection[i, k] == matrix[k][k]
            assert counts.union[i, k] == sum(matrix[k]) + matrix[1 - k][k]
            for j in (0, 1):
                total[class_id][j][k] += matrix[j][k]
    ious = []
    for c in CLASSES:
        (_, false_positive), (false_negative, true_positive) = total[c]
        union = true_positive + false_positive + false_negative
        ious.append(true_positive / union if union else math.nan)
    summed = per_class(episodes)
    assert class_iou(summed) == pytest.approx(ious, rel=1e-15, nan_ok=True)
    present = [iou for iou in ious if not math.isnan(iou)]
    assert miou(summed) == pytest.approx(math.fsum(present) / len(present) if present else 0.0, rel=1e-14)
    both = [[sum(total[c][t][p] for c in CLASSES) for p in (0, 1)] for t in (0, 1)]
    wrong = both[0][1] + both[1][0]
    halves = [both[k][k] / max(both[k][k] + wrong, 1) for k in (0, 1)]
    assert fb_iou(summed) == pytest.approx(sum(halves) / 2, rel=1e-15)


@settings(max_examples=60, deadline=None)
@given(episode_lists(), st.lists(st.integers(0, 2), min_size=6, max_size=6), st.randoms(use_true_random=False))
def test_the_same_bits_however_episodes_are_shared_out(episodes: Episodes, shares: list[int], random: object) -> None:
    """Three workers, any of them with nothing to do, added up in any order."""
    whole = per_class(episodes)
    none = np.zeros((len(CLASSES), 2), dtype=np.int64)
    parts = []
    for worker in range(3):
        share = [e for e, owner in zip(episodes, shares, strict=False) if owner == worker]
        parts.append(per_class(share) if share else Counts(none, none))
    random.shuffle(parts)  # type: ignore[attr-defined]
    intersections = parts[0].intersection + parts[1].intersection + parts[2].intersection
    together = Counts(intersections, parts[0].union + parts[1].union + parts[2].union)
    np.testing.assert_array_equal(together.intersection, whole.intersection)
    np.testing.assert_array_equal(together.union, whole.union)
    assert together.union.dtype == np.int64
    assert miou(together).hex() == miou(whole).hex()
    assert fb_iou(together).hex() == fb_iou(whole).hex()


def test_numbers_by_hand() -> None:
    truth = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 255]], [[0, 0, 0, 1], [0, 0, 0, 255]]], dtype=torch.uint8)
    predicted = torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 1]], [[0, 0, 0, 0], [0, 0, 0, 1]]], dtype=torch.bool)
    counts = episode_counts(predicted, truth)
    assert counts.intersection.tolist() == [[2, 2], [6, 0]]
    assert counts.union.tolist() == [[5, 5], [7, 1]]
    summed = sum_by_class(counts, [7, 3], CLASSES)
    assert summed.intersection.tolist() == [[6, 0], [2, 2], [0, 0]]
    iou = class_iou(summed)
    assert iou[:2] == [0.0, 0.4]
    assert math.isnan(iou[2])  # a class that did not occur has no IoU, and does not lower the mean
    assert miou(summed) == 0.2
    assert fb_iou(summed) == pytest.approx((8 / 12 + 2 / 6) / 2)


def test_counts_are_summed_before_they_are_divided() -> None:
    """An episode of a large object weighs more than one of a small object of the same class."""
    counts = Counts(np.array([[0, 90], [0, 0]]), np.array([[0, 100], [0, 10]]))
    assert miou(sum_by_class(counts, [3, 3], CLASSES)) == 90 / 110  # the mean of the two would be 0.45


def test_nothing_at_all() -> None:
    everything_ignored = torch.full((1, 2, 3), 255, dtype=torch.uint8)
    counts = episode_counts(torch.ones((1, 2, 3), dtype=torch.bool), everything_ignored)
    summed = sum_by_class(counts, [3], CLASSES)
    assert summed.union.sum() == 0
    assert (miou(summed), fb_iou(summed)) == (0.0, 0.0)


def test_large_sums_do_not_overflow() -> None:
    pixels = 640 * 640
    counts = Counts(np.full((20_000, 2), pixels), np.full((20_000, 2), pixels))
    summed = sum_by_class(counts, [3] * 20_000, CLASSES)
    assert summed.union[0, 1] == 20_000 * pixels > 2**32
    assert miou(summed) == 1.0


def test_a_class_of_another_fold_is_a_bug() -> None:
    with pytest.raises(KeyError, match="5"):
        sum_by_class(Counts(np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int64)), [5], CLASSES)
