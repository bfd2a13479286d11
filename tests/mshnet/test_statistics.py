"""The bootstrap against plain loops over the same draws, and against data whose truth is known."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mshnet import statistics
from mshnet.errors import InputError
from mshnet.metrics import Counts, fb_iou, miou, sum_by_class
from mshnet.outcomes import Outcomes
from mshnet.statistics import (
    bootstrap,
    bootstrap_mean,
    by_query,
    by_size,
    concatenated,
    paired,
    paired_in_detail,
    spread,
)

QUERY_PX = 1000
CLASSES = (2, 5, 9)


def outcomes_of(rows: Sequence[tuple[int, int, int]]) -> Outcomes:
    """From (class, foreground's intersection, foreground's union) of each episode."""
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    class_ids, inside, union = table.T
    background = np.stack([QUERY_PX - union, QUERY_PX - inside], axis=1)  # union - inside pixels are wrong
    counts = Counts(
        np.stack([background[:, 0], inside], axis=1), np.stack([background[:, 1], union], axis=1).astype(np.int64)
    )
    return Outcomes(counts, class_ids, inside, np.full(len(table), QUERY_PX))


def drawn(rng: np.random.Generator, per_class: int, mean: float = 0.6, classes: Sequence[int] = CLASSES) -> Outcomes:
    """Episodes whose IoU varies around `mean`; the sizes of their objects too, independently."""
    class_ids = np.tile(classes, per_class)
    union = rng.integers(100, 500, len(class_ids))
    iou = rng.uniform(mean - 0.3, mean + 0.3, len(class_ids))
    return outcomes_of(list(zip(class_ids, np.rint(union * iou).astype(int), union, strict=True)))


def selected(outcomes: Outcomes, order: np.ndarray) -> Outcomes:
    counts = Counts(outcomes.counts.intersection[order], outcomes.counts.union[order])
    return Outcomes(counts, outcomes.class_ids[order], outcomes.object_px[order], outcomes.counted_px[order])


@st.composite
def few_episodes(draw: st.DrawFn) -> Outcomes:
    """Up to 8 episodes; classes may be absent, and unions empty."""
    one = st.tuples(st.sampled_from(CLASSES), st.integers(0, 40), st.integers(0, 40))
    rows = draw(st.lists(one, min_size=1, max_size=8))
    return outcomes_of([(c, min(i, u), u) for c, i, u in rows])


def slow_resamples(outcomes: Outcomes, samples: int, seed: int) -> list[Outcomes]:
    """Episode by episode, the upper half of each raw number as a place among the class's episodes."""
    chosen: list[list[int]] = [[] for _ in range(samples)]
    for class_id in CLASSES:
        members = [i for i, c in enumerate(outcomes.class_ids) if c == class_id]
        raw = np.random.Philox(key=np.array([seed, class_id], dtype=np.uint64))
        for sample in chosen:
            for _ in members:
                upper = int(raw.random_raw()) // 2**32
                sample.append(members[int(Fraction(upper, 2**32) * len(members))])
    return [selected(outcomes, np.array(sample, dtype=np.int64)) for sample in chosen]


@settings(max_examples=25, deadline=None)
@given(few_episodes(), st.integers(0, 2**64 - 1))
def test_against_plain_loops_over_the_same_resamples(outcomes: Outcomes, seed: int) -> None:
    samples = 20
    found = bootstrap(outcomes, CLASSES, samples, seed)
    resamples = slow_resamples(outcomes, samples, seed)
    sums = [sum_by_class(x.counts, x.class_ids.tolist(), CLASSES) for x in resamples]
    ends = [0.025, 0.975]
    assert found.miou == pytest.approx(np.quantile([miou(x) for x in sums], ends), rel=1e-12)
    assert found.fb_iou == pytest.approx(np.quantile([fb_iou(x) for x in sums], ends), rel=1e-12)
    for row, class_id in enumerate(CLASSES):
        union = outcomes.counts.union[outcomes.class_ids == class_id, 1]
        assert (class_id in found.class_iou) == bool(union.sum())
        if class_id in found.class_iou:
            values = [x.intersection[row, 1] / x.union[row, 1] for x in sums if x.union[row, 1]]
            assert found.class_iou[class_id] == pytest.approx(np.quantile(values, ends), rel=1e-12)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, held, tries = 0.6, 0, 300
    for seed in range(tries):
        low, high = bootstrap(drawn(rng, 60), CLASSES, 300, seed).miou
        held += low <= truth <= high
    assert 0.91 <= held / tries <= 0.98  # 0.95 ± 3 standard errors


def test_queries_that_repeat_need_to_be_resampled_whole() -> None:
    """Three episodes of each query, what is hard about it the same in all: other images would vary more."""
    rng = np.random.default_rng(13)
    truth, tries, held = 0.6, 300, {"episodes": 0, "queries": 0}
    for seed in range(tries):
        hardness = np.repeat(rng.uniform(-0.25, 0.25, 40), 3)
        iou = truth + hardness + rng.uniform(-0.1, 0.1, 120)
        inside = np.rint(300 * iou).astype(int)
        episodes = outcomes_of([(2, i, 300) for i in inside])
        queries = [f"2007_{i // 3:06d}" for i in range(120)]
        for name, outcomes in (("episodes", episodes), ("queries", by_query(episodes, queries))):
            low, high = bootstrap(outcomes, CLASSES, 300, seed).miou
            held[name] += low <= truth <= high
    assert held["episodes"] / tries < 0.85
    assert 0.90 <= held["queries"] / tries <= 0.98


def test_a_row_per_class_and_query() -> None:
    outcomes = outcomes_of([(2, 10, 20), (5, 30, 60), (2, 5, 40), (2, 1, 2)])
    found = by_query(outcomes, ["b", "b", "b", "a"])  # the first and the third are the same class and query
    expected = outcomes_of([(2, 1, 2), (2, 15, 60), (5, 30, 60)])
    np.testing.assert_array_equal(found.class_ids, expected.class_ids)
    np.testing.assert_array_equal(found.counts.intersection[:, 1], [1, 15, 30])
    np.testing.assert_array_equal(found.counts.union[:, 1], [2, 60, 60])
    np.testing.assert_array_equal(found.object_px, [1, 15, 30])
    np.testing.assert_array_equal(found.counted_px, [QUERY_PX, 2 * QUERY_PX, QUERY_PX])
    sums = [sum_by_class(x.counts, x.class_ids.tolist(), CLASSES) for x in (outcomes, found)]
    np.testing.assert_array_equal(sums[0].intersection, sums[1].intersection)
    np.testing.assert_array_equal(sums[0].union, sums[1].union)


def test_four_times_the_episodes_halve_the_interval() -> None:
    rng = np.random.default_rng(1)
    widths = []
    for per_class in (100, 400, 1600):
        low, high = bootstrap(drawn(rng, per_class), CLASSES, 1000).miou
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.15)


def test_same_seed_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = drawn(np.random.default_rng(2), 50)
    found = bootstrap(outcomes, CLASSES, 200, seed=7)
    by_class = selected(outcomes, np.argsort(outcomes.class_ids, kind="stable"))
    assert bootstrap(by_class, CLASSES, 200, seed=7) == found  # how classes follow each other is nothing to it
    monkeypatch.setattr(statistics, "_AT_ONCE", 130)  # two resamples at a time, the last one alone
    assert bootstrap(outcomes, CLASSES, 200, seed=7) == found
    assert bootstrap(outcomes, CLASSES, 200, seed=8) != found


def test_the_bits_of_a_known_table() -> None:
    """Fails where the draws change: intervals in old reports could not be made again."""
    outcomes = outcomes_of([(c, 10 * i + c, 100 + 10 * i) for c in CLASSES for i in range(12)])
    found = bootstrap(outcomes, CLASSES, 500, seed=3)
    assert found.miou == pytest.approx((0.3379954199938532, 0.42999146234201857), rel=1e-14)
    assert found.fb_iou == pytest.approx((0.6203092141026877, 0.6649942528735632), rel=1e-14)


def test_the_order_within_a_class_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    outcomes = drawn(rng, 100)
    low, high = bootstrap(outcomes, CLASSES, 4000).miou
    other = bootstrap(selected(outcomes, rng.permutation(len(outcomes))), CLASSES, 4000).miou
    assert other == pytest.approx((low, high), abs=0.1 * (high - low))


def test_memory_does_not_grow_with_the_resamples() -> None:
    outcomes = drawn(np.random.default_rng(4), 10_000, classes=(5,))
    tracemalloc.start()
    try:
        bootstrap(outcomes, CLASSES, 400)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20  # all draws at once would be 32 MB, and their weights again


def test_one_episode_per_class_has_no_width() -> None:
    outcomes = outcomes_of([(2, 30, 60), (5, 10, 40)])
    found = bootstrap(outcomes, CLASSES, 50)
    assert found.miou == (0.375, 0.375)
    assert found.class_iou == {2: (0.5, 0.5), 5: (0.25, 0.25)}  # none of the class that did not occur


def test_nothing_to_resample() -> None:
    nothing = bootstrap(outcomes_of([]), CLASSES, 10)
    assert (nothing.miou, nothing.fb_iou, nothing.class_iou) == ((0.0, 0.0), (0.0, 0.0), {})


def test_a_class_of_another_fold_is_a_bug() -> None:
    with pytest.raises(KeyError, match="7"):
        bootstrap(outcomes_of([(7, 1, 2)]), CLASSES, 10)


@pytest.mark.parametrize(("samples", "seed", "level"), [(0, 0, 0.95), (10, -1, 0.95), (10, 0, 95.0)])
def test_numbers_that_make_no_sense(samples: int, seed: int, level: float) -> None:
    with pytest.raises(InputError, match="expected"):
        bootstrap(outcomes_of([(2, 1, 2)]), CLASSES, samples, seed, level)


def test_the_mean_of_four_folds_is_surer_than_one() -> None:
    rng = np.random.default_rng(5)
    folds = [(drawn(rng, 200), CLASSES) for _ in range(4)]
    (low, high), (fb_low, fb_high) = bootstrap_mean(folds, 1000)
    widths = [high - low for low, high in (bootstrap(outcomes, CLASSES, 1000).miou for outcomes, _ in folds)]
    assert high - low == pytest.approx(np.mean(widths) / 2, rel=0.15)
    assert low < np.mean([miou(sum_by_class(x.counts, x.class_ids.tolist(), CLASSES)) for x, _ in folds]) < high
    assert fb_low < np.mean([fb_iou(sum_by_class(x.counts, x.class_ids.tolist(), CLASSES)) for x, _ in folds]) < fb_high
    alone = bootstrap_mean(folds[:1], 1000)
    one = bootstrap(folds[0][0], CLASSES, 1000)
    assert alone == (one.miou, one.fb_iou)


def test_folds_are_drawn_apart() -> None:
    """Resampled alike, two folds of the same episodes would be no surer than one."""
    rng = np.random.default_rng(12)
    a = drawn(rng, 50)
    b = worse(a, rng, by=0.1, noise=0.1)
    once, twice = (bootstrap_mean([(a, CLASSES)] * folds, 2000)[0] for folds in (1, 2))
    assert (once[1] - once[0]) / (twice[1] - twice[0]) == pytest.approx(2**0.5, rel=0.1)
    once_paired, twice_paired = (paired([(a, b, CLASSES)] * folds, 2000) for folds in (1, 2))
    assert once_paired.half_width / twice_paired.half_width == pytest.approx(2**0.5, rel=0.1)


def worse(outcomes: Outcomes, rng: np.random.Generator, by: float, noise: float = 0.02) -> Outcomes:
    """The same episodes, each IoU lower by about `by`."""
    union = outcomes.counts.union[:, 1]
    change = union * rng.normal(by, noise, len(outcomes))
    inside = np.clip(np.rint(outcomes.counts.intersection[:, 1] - change), 0, union).astype(np.int64)
    changed = outcomes_of(list(zip(outcomes.class_ids, inside, union, strict=True)))
    return dataclasses.replace(changed, object_px=outcomes.object_px)


def test_a_run_does_not_differ_from_itself() -> None:
    outcomes = drawn(np.random.default_rng(6), 30)
    found = paired([(outcomes, outcomes, CLASSES)] * 2, 200)
    assert (found.miou, found.low, found.high, found.half_width, found.p_value) == (0.0, 0.0, 0.0, 0.0, 1.0)
    assert not found.shown


def test_a_shift_is_found_that_two_intervals_would_not_show() -> None:
    rng = np.random.default_rng(7)
    a = drawn(rng, 60)
    b = worse(a, rng, by=0.01)
    found = paired([(a, b, CLASSES)], 1000)
    assert found.shown
    assert found.low < 0.01 < found.high
    assert found.p_value == 2 / 1001
    apart = [bootstrap(x, CLASSES, 1000).miou for x in (a, b)]
    assert apart[0][0] < apart[1][1]  # the intervals overlap
    assert found.half_width < 0.2 * (apart[0][1] - apart[0][0])
    back = paired([(b, a, CLASSES)], 1000)
    assert (back.miou, back.low, back.high) == pytest.approx((-found.miou, -found.high, -found.low), rel=1e-12)


def test_where_a_difference_comes_from() -> None:
    rng = np.random.default_rng(11)
    folds = [(drawn(rng, 40), (2, 5, 9)), (drawn(rng, 40, classes=(3, 4)), (3, 4, 7))]
    parts = [(folds[0][0], folds[0][0], folds[0][1]), (folds[1][0], worse(folds[1][0], rng, by=0.05), folds[1][1])]
    found = paired_in_detail(parts, 500)
    assert found.mean == paired(parts, 500)
    assert found.mean.miou == pytest.approx(np.mean([x.miou for x in found.folds]), rel=1e-12)
    assert [x.shown for x in found.folds] == [False, True]
    assert [list(x) for x in found.classes] == [[2, 5, 9], [3, 4]]  # none of class 7 was drawn
    assert found.folds[0] == paired(parts[:1], 500)
    for difference, by_class in zip(found.folds, found.classes, strict=True):
        assert difference.miou == pytest.approx(np.mean([x.miou for x in by_class.values()]), abs=1e-15)
    assert all(x.shown and x.low < 0.05 < x.high for x in found.classes[1].values())


def test_where_there_is_no_difference_one_is_found_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    found = []
    for seed in range(300):
        a = drawn(rng, 60)
        found.append(paired([(a, worse(a, rng, by=0.0), CLASSES)], 300, seed))
    assert 0.015 <= np.mean([x.p_value < 0.05 for x in found]) <= 0.095
    assert 0.015 <= np.mean([x.shown for x in found]) <= 0.095
    assert 0.4 <= np.mean([x.p_value < 0.5 for x in found]) <= 0.6


def test_other_episodes_are_refused() -> None:
    a = drawn(np.random.default_rng(9), 5)
    for b in (
        selected(a, np.arange(len(a) - 1)),
        dataclasses.replace(a, class_ids=a.class_ids[::-1]),
        dataclasses.replace(a, counted_px=a.counted_px + 1),
    ):
        with pytest.raises(InputError, match="the same episodes"):
            paired([(a, b, CLASSES)], 10)


def test_sizes_by_the_share_of_what_counts() -> None:
    rows = [(2, 49, 98), (2, 50, 100), (5, 199, 398), (5, 200, 400), (5, 900, 900)]  # of 1,000 pixels
    found = by_size(outcomes_of(rows), CLASSES)
    assert found == {"small": (0.5, 1), "medium": (0.5, 2), "large": (1100 / 1300, 2)}
    assert list(by_size(outcomes_of(rows[3:]), CLASSES)) == ["large"]
    ignored = dataclasses.replace(outcomes_of([(2, 0, 0)]), counted_px=np.zeros(1, np.int64))
    assert by_size(ignored, CLASSES) == {"small": (0.0, 1)}


def test_spread_over_seeds() -> None:
    assert spread([0.5, 0.6, 0.7]) == pytest.approx(0.1)
    assert spread([0.5]) is None


def test_seeds_one_after_the_other() -> None:
    rng = np.random.default_rng(10)
    parts = [drawn(rng, 3), drawn(rng, 2)]
    whole = concatenated(parts)
    assert len(whole) == 15
    np.testing.assert_array_equal(whole.counts.union[9:], parts[1].counts.union)
    np.testing.assert_array_equal(whole.class_ids[:9], parts[0].class_ids)
    with pytest.raises(InputError, match="at least one"):
        concatenated([])
