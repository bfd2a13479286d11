"""The baselines on hand-made features whose cosines are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mshnet.backbone import Features
from mshnet.baselines import (
    THRESHOLDS,
    _of_all_thresholds,
    best_threshold,
    foreground,
    prototype_cosine,
    prototype_threshold,
)
from mshnet.data.batches import EpisodeBatch
from mshnet.features import FeatureCache
from mshnet.masking import resize
from mshnet.metrics import episode_counts

SIDE = 8


def features(level4: Tensor) -> Features:
    """Level 4 as given (n, c, h, w) as the last of two layers; everything else must not be read."""
    junk = torch.full_like(level4, math.nan)
    return Features(junk[:, None], torch.stack([junk, level4], dim=1), junk[:, None])


def batch(query_mask: Tensor, support_masks: Tensor, class_id: int = 0) -> EpisodeBatch:
    """One episode of masks; its pictures are black."""
    shots, side = len(support_masks), query_mask.shape[-1]
    return EpisodeBatch(
        query_images=torch.zeros(1, 3, side, side, dtype=torch.uint8),
        query_masks=query_mask[None].to(torch.uint8),
        support_images=torch.zeros(1, shots, 3, side, side, dtype=torch.uint8),
        support_masks=support_masks[None].to(torch.uint8),
        query_rows=(0,),
        support_rows=((1,) * shots,),
        class_ids=(class_id,),
    )


class HandMade(FeatureCache):
    """Gives each batch in turn the features made for it."""

    def __init__(self, made: Sequence[tuple[Features, Features]]) -> None:
        self.made = iter(made)

    def of(self, batch: EpisodeBatch) -> tuple[Features, Features]:
        return next(self.made)


def test_everything_is_foreground() -> None:
    truth = torch.zeros(4, 4)
    truth[0, :3], truth[3, :2] = 1, 255
    given = batch(truth, torch.ones(1, 4, 4))
    mask = foreground(features(torch.zeros(1, 1, 2, 2)), features(torch.zeros(1, 1, 2, 2)), given).masks((4, 4))
    assert (mask.dtype, tuple(mask.shape)) == (torch.bool, (1, 4, 4))
    counts = episode_counts(mask, given.query_masks)
    assert counts.intersection.tolist() == [[0, 3]]
    assert counts.union.tolist() == [[11, 14]]  # of 16 pixels 2 are ignored


def test_cosines_by_hand() -> None:
    """Two shots whose objects are (3, 0) and (0, 4): the prototype's direction is (3, 4)."""
    supports = torch.zeros(2, 2, 2, 2)
    supports[0, 0], supports[1, 1] = 3, 4
    supports[0, 1] = -9  # cut off by the ReLU, as the backbone's maps come before it
    query = torch.tensor([[3.0, 4.0], [4.0, -3.0], [-1.0, -1.0], [4.0, 3.0]]).T.reshape(1, 2, 2, 2)
    given = batch(torch.zeros(3, 3), torch.ones(2, 3, 3))
    low = prototype_cosine(features(query), features(supports), given)
    assert tuple(low.shape) == (1, 2, 2)
    found = resize(low[:, None], (3, 3))[:, 0]
    corners = [1.0, 0.6, 0.0, 0.96]
    assert tuple(found.shape) == (1, 3, 3)
    assert found[0, ::2, ::2].flatten().tolist() == pytest.approx(corners, abs=1e-6)
    # Between them: bilinear with aligned corners.
    assert found[0, 1, 1].item() == pytest.approx(sum(corners) / 4, abs=1e-6)
    assert found[0, 0, 1].item() == pytest.approx(0.8, abs=1e-6)
    # The same from bfloat16, in which these features are exact: only they are rounded, nothing after them.
    short = (features(maps.bfloat16()) for maps in (query, supports))
    again = prototype_cosine(*short, given)
    assert torch.equal(again, low)


def test_only_the_object_makes_the_prototype() -> None:
    """Left of the support (the object) the feature is (1, 0), at the right (0, 1)."""
    support = torch.zeros(1, 2, SIDE, SIDE)
    support[0, 0, :, :4], support[0, 1, :, 4:] = 1, 1
    left = torch.zeros(1, SIDE, SIDE)
    left[0, :, :3] = 1
    truth = torch.zeros(SIDE, SIDE)
    of_left = prototype_cosine(features(support), features(support), batch(truth, left))
    assert of_left[0, :, :4].min() > 0.999
    assert of_left[0, :, 4:].max() < 0.001
    of_right = prototype_cosine(features(support), features(support), batch(truth, left.flip(2)))
    assert torch.allclose(of_right, of_left.flip(2), atol=1e-6)
    nothing = prototype_cosine(features(support), features(support), batch(truth, torch.zeros(1, SIDE, SIDE)))
    assert nothing.abs().max() == 0  # a support without an object resembles nothing


def test_episodes_of_a_batch_are_apart() -> None:
    query, support = torch.rand(2, 4, 3, 3), torch.rand(2 * 2, 4, 3, 3)
    masks = torch.ones(2, 3, 3)
    masks[1, 0] = 0
    one = batch(torch.zeros(3, 3), masks)
    both = EpisodeBatch(
        query_images=one.query_images.repeat(2, 1, 1, 1),
        query_masks=one.query_masks.repeat(2, 1, 1),
        support_images=one.support_images.repeat(2, 1, 1, 1, 1),
        support_masks=one.support_masks.repeat(2, 1, 1, 1),
        query_rows=(0, 0),
        support_rows=((1, 1), (1, 1)),
        class_ids=(0, 0),
    )
    together = prototype_cosine(features(query), features(support), both)
    for i in range(2):
        alone = prototype_cosine(features(query[i : i + 1]), features(support[2 * i : 2 * i + 2]), one)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_the_mask_is_where_the_cosine_exceeds_the_threshold() -> None:
    query, support = features(torch.rand(1, 4, 3, 3)), features(torch.rand(1, 4, 3, 3))
    given = batch(torch.zeros(9, 9), torch.ones(1, 9, 9))
    cosine = resize(prototype_cosine(query, support, given)[:, None], (9, 9))[:, 0]
    threshold = cosine.median().item()
    mask = prototype_threshold(threshold)(query, support, given).masks((9, 9))
    assert torch.equal(mask, cosine > threshold)
    assert mask.sum() == 40  # of 81: the median itself is not above


def known(object_cosine: float, ground_cosine: float, class_id: int) -> tuple[tuple[Features, Features], EpisodeBatch]:
    """An episode whose object, a quarter of the image, has one cosine to the prototype and the ground another."""
    truth = torch.zeros(SIDE, SIDE)
    truth[:4, :4] = 1
    cosine = torch.where(truth == 1, object_cosine, ground_cosine)
    query = torch.stack([cosine, (1 - cosine**2).sqrt()])[None]
    support = torch.zeros(1, 2, SIDE, SIDE)
    support[0, 0] = 1
    return (features(query), features(support)), batch(truth, torch.ones(1, SIDE, SIDE), class_id)


def chosen(*episodes: tuple[tuple[Features, Features], EpisodeBatch], classes: Sequence[int]) -> float:
    return best_threshold(HandMade([made for made, _ in episodes]), [given for _, given in episodes], classes)


def test_the_best_threshold_is_found() -> None:
    # Perfect from 0.605 to 0.805: the first of the hundredths in between.
    assert chosen(known(0.805, 0.605, 0), classes=(0,)) == pytest.approx(0.61)
    # Both perfect only between 0.705 and 0.755.
    assert chosen(known(0.755, 0.605, 0), known(0.905, 0.705, 1), classes=(0, 1)) == pytest.approx(0.71)
    assert (THRESHOLDS[0], THRESHOLDS[-1], len(THRESHOLDS)) == (-0.2, 0.99, 120)


def test_classes_weigh_the_same_whatever_their_episodes() -> None:
    """No threshold serves both classes: the one of many episodes must not outvote the other.

    At 0.31 the class IoUs are 1 and 1/4 (all foreground), at 0.71 they are 0 (no foreground) and 1.
    Of pooled pixels 16/52 and 12/16 would be right instead.
    """
    rare, frequent = known(0.505, 0.305, 5), [known(0.905, 0.705, 9)] * 3
    assert chosen(rare, *frequent, classes=(5, 9)) == pytest.approx(0.31)
    assert chosen(*frequent, classes=(9,)) == pytest.approx(0.71)


def test_every_threshold_is_counted_as_its_mask_would_be() -> None:
    """Also where cosines are thresholds to the bit: above means above."""
    random = torch.Generator().manual_seed(0)
    cosine = torch.rand(3, 9, 7, generator=random) * 1.6 - 0.5
    cosine[0, :5] = torch.tensor(THRESHOLDS)[torch.randint(0, 120, (5, 7), generator=random)]
    truth = torch.tensor([0, 1, 255], dtype=torch.uint8)[torch.randint(0, 3, (3, 9, 7), generator=random)]
    found = _of_all_thresholds(cosine, truth)
    for i, threshold in enumerate(THRESHOLDS):
        expected = episode_counts(cosine > threshold, truth)
        assert found[:, i].tolist() == [expected.intersection.tolist(), expected.union.tolist()]
