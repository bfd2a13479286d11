"""Large pictures in windows: all is covered, and each pixel is the blend of what its windows say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mshnet.tiles import Blend, windows
from tests.mshnet.segmenters import picture, segmenter
from tests.tolerances import SAME_PREDICTION


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize(("height", "width"), [(33, 500), (100, 101), (257, 300), (99, 40)])
def test_windows_cover_and_overlap(height: int, width: int, overlap: float) -> None:
    tile = 100
    found = windows(height, width, tile, overlap)
    seen = np.zeros((height, width), int)
    for rows, columns in found:
        assert rows.stop - rows.start == min(tile, height)
        assert columns.stop - columns.start == min(tile, width)
        assert 0 <= rows.start < rows.stop <= height
        assert 0 <= columns.start < columns.stop <= width
        seen[rows, columns] += 1
    assert seen.min() >= 1
    starts = sorted({columns.start for _, columns in found})
    for one, following in itertools.pairwise(starts):
        assert one + tile - following >= round(overlap * tile) - 1
    assert windows(height, width, 0, overlap) == [(slice(0, height), slice(0, width))]


def test_equal_values_blend_to_themselves() -> None:
    blend = Blend(2, 90, 130, torch.device("cpu"))
    for rows, columns in windows(90, 130, 50, 0.3):
        for number in range(2):
            blend.add(number, (rows, columns), torch.full((rows.stop - rows.start, columns.stop - columns.start), 3.5))
    assert (blend.mean() - 3.5).abs().max() < SAME_PREDICTION.bound


def test_a_tiled_picture_is_the_blend_of_its_parts() -> None:
    """Against the segmenter's own answers for each part, cut out beforehand, as weighted means of logits."""
    image, mask = picture(1, 60, 60)
    user = segmenter()
    user.learn("it", [image], [mask])
    large = picture(2, 90, 140)[0]
    total, weights = np.zeros((90, 140)), np.zeros((90, 140))
    for rows, columns in windows(90, 140, 60, 0.25):
        p = user(large[rows, columns]).probabilities[0].astype(np.float64)
        hat = np.minimum(np.arange(1, 61), np.arange(60, 0, -1)) / 30
        weight = hat[:, None] * hat
        total[rows, columns] += np.log(p / (1 - p)) * weight
        weights[rows, columns] += weight
    expected = 1 / (1 + np.exp(-total / weights))
    found = user(large, tile_px=60).probabilities[0]
    assert np.abs(found - expected).max() < 1e-3  # the logit of a float32 probability near 0 or 1 is rough
    assert np.abs(found - user(large).probabilities[0]).max() > 1e-2  # and windows see it otherwise
    np.testing.assert_array_equal(user(large, tile_px=140).probabilities, user(large).probabilities)
