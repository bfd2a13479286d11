"""Episodes: the published ones exactly; ours as a pure, balanced function of (seed, epoch, position)."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mshnet.config import paper_training
from mshnet.data.episodes import (
    Episode,
    NumberedPairs,
    TrainingSampler,
    numbered,
    published_episodes,
    sampled_episodes,
    small_classes,
    usable_classes,
)
from mshnet.data.folds import base_classes, novel_classes
from mshnet.data.splits import Pair, read_split_lists
from mshnet.errors import InputError
from tests.conftest import needs_shared

PAIRS: list[Pair] = [(f"image{i}", c) for c in range(5) for i in range(4 + 3 * c)]
NUMBERED, IDS = numbered(PAIRS)


@pytest.fixture(scope="module")
def official(shared: Path) -> Any:
    return json.loads(gzip.decompress((shared / "reference/episodes/official_test_episodes.json.gz").read_bytes()))


@needs_shared
@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize("fold", range(4))
@pytest.mark.parametrize("dataset", ["pascal", "coco"])
def test_published_episodes_exactly(dataset: str, fold: int, shot: int, official: Any, shared: Path) -> None:
    wanted = official[f"{dataset}_fold{fold}_{shot}shot"]
    lists = read_split_lists(dataset, str(shared / "reference/splits"), fold)
    drawn = published_episodes(dataset, lists.val, fold, shot)
    assert len(drawn) == 1000
    assert [[e.query, list(e.supports), e.class_id] for e in drawn[: len(wanted)]] == wanted
    assert len(wanted) == 250
    assert all(e.query not in e.supports and len(e.supports) == shot for e in drawn)
    assert drawn == published_episodes(dataset, lists.val, fold, shot, 1000, seed=0)
    other = published_episodes(dataset, lists.val, fold, shot, 1000, seed=1)
    assert sum(a == b for a, b in zip(drawn, other, strict=True)) < 30
    if dataset == "pascal":  # walks the list, from the start again where it ends
        assert [(e.query, e.class_id) for e in drawn] == [lists.val[i % len(lists.val)] for i in range(1000)]
        assert [(e.query, e.class_id) for e in other] == [(e.query, e.class_id) for e in drawn]


@needs_shared
def test_published_supports_may_repeat(shared: Path) -> None:
    """53 to 133 of 1,000 Pascal 5-shot episodes do."""
    repeated = []
    for fold in range(4):
        val = read_split_lists("pascal", str(shared / "reference/splits"), fold).val
        repeated.append(sum(len(set(e.supports)) < 5 for e in published_episodes("pascal", val, fold, 5)))
    assert (min(repeated), max(repeated)) == (53, 133)


@st.composite
def listed(draw: st.DrawFn) -> tuple[str, list[Pair], int]:
    """A data set, pairs of all of fold 0's classes in any order, and a number of shots that they allow."""
    dataset = draw(st.sampled_from(["pascal", "coco"]))
    classes = novel_classes(dataset, 0)
    shot = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(shot + 3, 30), min_size=len(classes), max_size=len(classes)))
    pairs = [(f"i{i}", c) for c, size in zip(classes, sizes, strict=True) for i in range(size)]
    return dataset, draw(st.permutations(pairs)), shot


@given(listed(), st.integers(1, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_seed_of_the_published_draw(lists: tuple[str, list[Pair], int], seed: int) -> None:
    dataset, pairs, shot = lists
    drawn = published_episodes(dataset, pairs, 0, shot, 60, seed)
    assert drawn == published_episodes(dataset, pairs, 0, shot, 60, seed)
    assert drawn[:25] == published_episodes(dataset, pairs, 0, shot, 25, seed)
    # Sixty supports drawn from four images or more: alike by chance never.
    assert drawn != published_episodes(dataset, pairs, 0, shot, 60)
    for episode in drawn:
        assert len(episode.supports) == shot
        assert episode.query not in episode.supports
        assert {(image, episode.class_id) for image in episode.images} <= set(pairs)
    if dataset == "pascal":
        assert [(e.query, e.class_id) for e in drawn] == [pairs[i % len(pairs)] for i in range(60)]


def test_published_needs_k_plus_one_images() -> None:
    pairs = [pair for pair in PAIRS if pair != ("image3", 0)]  # three aeroplanes left
    with pytest.raises(InputError, match=r"needs 4 images or more for 3-shot episodes; too few: aeroplane \(3\);"):
        published_episodes("pascal", pairs, 0, 3)
    drawn = published_episodes("pascal", pairs, 0, 3, count=90, skip_small_classes=True)
    assert {e.class_id for e in drawn} == {1, 2, 3, 4}
    assert small_classes(pairs, range(6), 3) == {0: 3, 5: 0}
    assert small_classes(pairs, range(5), 2) == {}


def test_a_class_without_any_image_is_no_published_coco_draw() -> None:
    pairs = [(f"image{i}", 4 * c) for c in range(19) for i in range(3)]
    with pytest.raises(InputError, match=r"too few: hair drier|too few: toaster|too few: \w+"):
        published_episodes("coco", pairs, 0, 1)
    assert len(published_episodes("coco", pairs, 0, 1, 50, skip_small_classes=True)) == 50


def test_the_same_image_listed_twice_is_one_image() -> None:
    pairs = [("only", c) for c in range(5)] * 3
    with pytest.raises(InputError, match="no class has the 2 images"):
        published_episodes("pascal", pairs, 0, 1, skip_small_classes=True)  # would never end otherwise


@pytest.mark.parametrize(("shot", "message"), [(0, "shot must be 1 or more, got 0"), (-2, "got -2")])
def test_no_shots(shot: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        published_episodes("pascal", PAIRS, 0, shot)
    with pytest.raises(InputError, match=message):
        sampled_episodes(PAIRS, shot, 10, 0)
    with pytest.raises(InputError, match=message):
        TrainingSampler(NUMBERED, range(5), shot, 0, 10)


def test_other_bad_numbers() -> None:
    with pytest.raises(InputError, match=r"fold must be 0\.\.3, got 7"):
        published_episodes("pascal", PAIRS, 7, 1)
    with pytest.raises(InputError, match="number of episodes must be 1 or more, got 0"):
        published_episodes("pascal", PAIRS, 0, 1, count=0)
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match=rf"seed of the published draw must be 0\.\.2\^32 - 1, got {seed}"):
            published_episodes("pascal", PAIRS, 0, 1, seed=seed)
    with pytest.raises(InputError, match="seed must be 0"):
        TrainingSampler(NUMBERED, range(5), 1, -1, 10)
    sampler = TrainingSampler(NUMBERED, range(5), 1, 0, 10)
    for epoch, position in ((0, 10), (-1, 0), (0, -1)):
        with pytest.raises(IndexError, match="no position"):
            sampler.episode(epoch, position)


@given(
    sizes=st.lists(st.integers(6, 30), min_size=1, max_size=8),
    shot=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**6),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_training_episodes_are_pure_balanced_and_valid(
    sizes: list[int], shot: int, seed: int, epoch: int, order: Any
) -> None:
    pairs, ids = numbered([(f"c{c}i{i}", c) for c, n in enumerate(sizes) for i in range(n)])
    count = 3 * len(sizes) + 1
    sampler = TrainingSampler(pairs, range(len(sizes)), shot, seed, count)
    episodes = [sampler.episode(epoch, i) for i in range(count)]
    # Pure: another sampler (as in another process) asked in another order says the same.
    again = pickle.loads(pickle.dumps(sampler))
    positions = list(range(count))
    order.shuffle(positions)
    assert {i: again.episode(epoch, i) for i in positions} == dict(enumerate(episodes))
    for episode in episodes:
        images = episode.images
        assert len(set(images)) == shot + 1
        assert all(ids[i].startswith(f"c{episode.class_id}i") for i in images)
    # Balanced: each class once in each block.
    for block in range(3):
        inside = episodes[block * len(sizes) : (block + 1) * len(sizes)]
        assert sorted(e.class_id for e in inside) == list(range(len(sizes)))


def test_seeds_and_epochs_differ_and_images_are_drawn_evenly() -> None:
    pairs, _ = numbered([(f"image{i}", 0) for i in range(10)])
    epochs = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = TrainingSampler(pairs, (0,), 2, seed, 3000)
        epochs.append([sampler.episode(epoch, i) for i in range(3000)])
    assert all(sum(a == b for a, b in zip(x, y, strict=True)) < 30 for x, y in pairwise(epochs))
    for role in ("query", "supports"):
        drawn = Counter(i for e in epochs[0] for i in ([e.query] if role == "query" else e.supports))
        expected = sum(drawn.values()) / 10
        chi_square = sum((n - expected) ** 2 / expected for n in drawn.values())
        assert len(drawn) == 10
        assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001; the draw is fixed


def test_the_order_of_training_is_pinned() -> None:
    """NumPy's raw Philox stream is fixed for ever; a change here would break resuming and comparisons."""
    sampler = TrainingSampler(NUMBERED, range(5), 2, 42, 100)
    assert [sampler.episode(3, i).named(IDS.__getitem__) for i in (0, 1, 99)] == [
        Episode("image3", ("image11", "image10"), 3),
        Episode("image14", ("image13", "image7"), 4),
        Episode("image7", ("image5", "image6"), 2),
    ]


# Images repeat within a class, and come in no order; six classes are of no interest.
UNTIDY: list[Pair] = [(f"image{31 * i * i % 701}", i * i // 7 % 12) for i in range(4000)]


def _digest(episodes: Iterable[Episode[str]]) -> str:
    listed = [[e.query, list(e.supports), e.class_id] for e in episodes]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("shot", "training", "test"),
    [(1, "5ce12a3b33831da1", "98aa3aed232619d8"), (5, "e0274f57df7ce88b", "dbf8d5730cee653e")],
)
def test_draws_over_untidy_pairs_are_pinned(shot: int, training: str, test: str) -> None:
    """A class's images are numbered in order of first appearance; a pair listed again changes nothing."""
    assert max(Counter(UNTIDY).values()) > 1
    pairs, ids = numbered(UNTIDY)
    sampler = TrainingSampler(pairs, [7, 3, 11, 0, 5], shot, 2**63 + 5, 1000)
    assert _digest(sampler.episode(2, i).named(ids.__getitem__) for i in range(1000)) == training
    assert _digest(sampled_episodes(UNTIDY, shot, 500, 9)) == test


def test_neighbouring_large_seeds_differ() -> None:
    """A seed above 2^63 must not pass through a float, where neighbours are the same."""
    drawn = [TrainingSampler(NUMBERED, range(5), 1, seed, 50) for seed in (2**64 - 1, 2**64 - 2)]
    assert [drawn[0].episode(0, i) for i in range(50)] != [drawn[1].episode(0, i) for i in range(50)]


def test_small_classes_in_training() -> None:
    names = ("ant", "bee", "cat", "dog", "elk")
    with pytest.raises(InputError, match=r"7 images or more for 6-shot episodes; too few: ant \(4\);"):
        TrainingSampler(NUMBERED, range(5), 6, 0, 10, class_names=names)
    assert TrainingSampler(NUMBERED, range(5), 6, 0, 10, skip_small_classes=True).classes == (1, 2, 3, 4)
    with pytest.raises(InputError, match=r"too few: class 7 \(0\)"):
        TrainingSampler(NUMBERED, (1, 7), 1, 0, 10)
    # The same rule over lists, without a sampler.
    assert usable_classes(PAIRS, range(5), 6, skip_small_classes=True) == (1, 2, 3, 4)
    with pytest.raises(InputError, match=r"too few: ant \(4\);"):
        usable_classes(PAIRS, range(5), 6, class_names=names)


def test_only_the_given_classes_are_trained_on() -> None:
    sampler = TrainingSampler(NUMBERED, (1, 3), 1, 0, 40)
    assert Counter(sampler.episode(0, i).class_id for i in range(len(sampler))) == {1: 20, 3: 20}


def test_our_protocol_is_balanced_and_leaves_small_classes_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        drawn = sampled_episodes(PAIRS, 5, 200, 7, ("ant", "bee", "cat", "dog", "elk"))
    assert caplog.messages == ["left out, fewer than 6 images: ant (4)"]
    assert Counter(e.class_id for e in drawn) == {1: 50, 2: 50, 3: 50, 4: 50}
    assert all(len({e.query, *e.supports}) == 6 for e in drawn)
    assert drawn == sampled_episodes(PAIRS, 5, 200, 7)
    assert drawn != sampled_episodes(PAIRS, 5, 200, 8)
    with pytest.raises(InputError, match="no class has the 31 images that 30-shot episodes need"):
        sampled_episodes(PAIRS, 30, 200, 7)


def test_numbered_pairs_keep_their_order() -> None:
    pairs, ids = numbered([("b", 3), ("a", 0), ("b", 1)])
    assert (pairs.images.tolist(), pairs.class_ids.tolist(), ids) == ([0, 1, 0], [3, 0, 1], ("b", "a"))
    assert numbered([])[1] == ()


def test_a_sampler_over_a_million_pairs_keeps_four_bytes_a_pair() -> None:
    """The columns given are 8 bytes a pair more, and need not be kept."""
    n, classes = 1_000_000, 60
    rng = np.random.default_rng(0)
    images, class_ids = (rng.integers(0, high, n, dtype=np.int32) for high in (n // 2, classes))
    pairs = NumberedPairs(images, class_ids)
    tracemalloc.start()
    sampler = TrainingSampler(pairs, range(classes), 5, 0, 100)
    kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes <= 4 * n + 20_000
    assert peak_bytes <= 6 * n
    assert len(pickle.dumps(sampler)) <= 4 * n + 20_000  # what each loader process is sent
    drawn = [sampler.episode(0, i) for i in range(100)]
    assert all(((images == e.query) & (class_ids == e.class_id)).any() for e in drawn)


@needs_shared
@pytest.mark.parametrize("fold", range(4))
def test_a_pascal_epoch_takes_750_images_of_each_class_as_the_paper_does(fold: int, shared: Path) -> None:
    pairs, _ = numbered(read_split_lists("pascal", str(shared / "reference/splits"), fold).train)
    classes = base_classes("pascal", fold)
    sampler = TrainingSampler(pairs, classes, 1, 0, paper_training().episodes_per_epoch)
    drawn = Counter(sampler.episode(1, i).class_id for i in range(len(sampler)))
    assert drawn == dict.fromkeys(classes, 750)


@needs_shared
@pytest.mark.parametrize("fold", range(4))
def test_coco_classes_are_uniform_in_every_block_of_60_episodes(fold: int, shared: Path) -> None:
    pairs, _ = numbered(read_split_lists("coco", str(shared / "reference/splits"), fold).train)
    classes = base_classes("coco", fold)
    sampler = TrainingSampler(pairs, classes, 1, 0, 7500)
    assert len(classes) == 60
    for block in (0, 1, 124):
        inside = [sampler.episode(0, i).class_id for i in range(60 * block, 60 * block + 60)]
        assert sorted(inside) == list(classes)
    assert len(sampler) == 125 * 60  # so an epoch has 125 of each
