"""The feature cache: the same features with and without it, each image computed once while it fits."""

from __future__ import annotations

import pytest
import torch

from mshnet.backbone import Backbone, Features
from mshnet.checkpoint import load_backbone_weights
from mshnet.data.transforms import normalise
from mshnet.features import FeatureCache
from tests.mshnet.noise_episodes import episode_batch, picture

GIB = 2**30
ONE_IMAGE_BYTES = 4 * 2 * (128 * 9 * 9 + 256 * 5 * 5 + 512 * 3 * 3)
"""ResNet-18 at 65 px: two maps a level, float32."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    backbone = Backbone("resnet18")
    load_backbone_weights(backbone, "random", seed=1)
    return backbone


def one_by_one(cache: FeatureCache, *rows: int) -> None:
    """Ask for single images: as episodes whose support is the query itself, two requests each."""
    for row in rows:
        cache.of(episode_batch([(row, (row,))]))


def assert_same_bits(found: Features, expected: Features) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("budget_bytes", [0, 1, 3 * ONE_IMAGE_BYTES, GIB])
def test_features_are_the_backbones(backbone: Backbone, budget_bytes: int) -> None:
    """Also when a batch holds more images than the budget."""
    batch = episode_batch([(0, (1, 2)), (3, (0, 4))])
    cache = FeatureCache(backbone, budget_bytes)
    for _ in range(2):
        query, support = cache.of(batch)
        expected = [backbone(normalise(picture(row)[0][None])) for row in (0, 3, 1, 2, 0, 4)]
        for found, first, last in ((query, 0, 2), (support, 2, 6)):
            for level, maps in enumerate(found):
                truth = torch.cat([features[level] for features in expected[first:last]])
                assert maps.shape == truth.shape
                # Float32 sums in another order, where the batch goes through at once.
                assert (maps - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert sum(maps.numel() * 4 for maps in expected[0]) == ONE_IMAGE_BYTES
    assert cache.hits + cache.misses == (12 if budget_bytes else 0)


def test_an_images_bits_do_not_depend_on_its_batch(backbone: Backbone) -> None:
    """Whichever batch asks first, so that a resumed run goes on with the same bits."""
    alone, among = FeatureCache(backbone, GIB), FeatureCache(backbone, GIB)
    expected, _ = alone.of(episode_batch([(5, (6,))]))
    query, support = among.of(episode_batch([(1, (2, 5)), (7, (8, 9)), (5, (3, 4))]))
    assert_same_bits(Features(*(maps[2:] for maps in query)), expected)
    assert_same_bits(Features(*(maps[1:2] for maps in support)), expected)
    one_by_one(among, 10, 11)
    again, _ = among.of(episode_batch([(5, (6,))]))
    assert_same_bits(again, expected)


def test_hits_misses_and_calls_of_the_backbone(backbone: Backbone) -> None:
    sizes: list[int] = []
    handle = backbone.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    try:
        cache = FeatureCache(backbone, GIB)
        cache.of(episode_batch([(0, (1, 2)), (3, (0, 1))]))
        assert (cache.misses, cache.hits) == (4, 2)
        cache.of(episode_batch([(2, (4,))]))
        assert (cache.misses, cache.hits) == (5, 3)
        assert sizes == [1] * 5
        sizes.clear()
        off = FeatureCache(backbone, 0)
        off.of(episode_batch([(0, (1, 2)), (3, (0, 1))]))
        off.of(episode_batch([(0, (1,))]))
        assert sizes == [6, 2]
        assert (off.misses, off.hits) == (0, 0)
    finally:
        handle.remove()


@pytest.mark.parametrize(("budget_bytes", "kept"), [(2 * ONE_IMAGE_BYTES, 2), (2 * ONE_IMAGE_BYTES - 1, 1)])
def test_the_budget_is_kept_to_the_byte(backbone: Backbone, budget_bytes: int, kept: int) -> None:
    cache = FeatureCache(backbone, budget_bytes)
    one_by_one(cache, 0, 1, 2)
    assert (cache.misses, cache.hits) == (3, 3)
    one_by_one(cache, 2)  # the latest is kept
    assert cache.misses == 3
    one_by_one(cache, 1)
    assert cache.misses == 3 + (kept < 2)


def test_the_least_recently_used_goes_first(backbone: Backbone) -> None:
    cache = FeatureCache(backbone, 2 * ONE_IMAGE_BYTES)
    one_by_one(cache, 0, 1, 0, 2)  # 1 is older than 0 now, though it came later
    assert cache.misses == 3
    one_by_one(cache, 0, 2)
    assert cache.misses == 3
    one_by_one(cache, 1)
    assert cache.misses == 4
    one_by_one(cache, 0)
    assert cache.misses == 5
