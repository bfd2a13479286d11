"""How sure a test number is: intervals by bootstrap over episodes, and a paired test between two of them.

Episodes are resampled within each class, as often as the class has them, because mIoU gives each class the same
weight. Counts are integers and the draws the raw output of Philox, which NumPy promises not to change: the same
outcomes and seed give the same bits on any machine. What such an interval does not cover: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from mshnet.errors import InputError
from mshnet.metrics import Counts, class_iou, miou, sum_by_class
from mshnet.outcomes import Outcomes

LEVEL = 0.95
SIZES = {"small": 0.05, "medium": 0.20, "large": 1.0}
"""The share of the query's counted pixels below which its object has that size; `large` has all that is left."""
_AT_ONCE = 2**18  # draws in memory; these stay in a core's cache

Ends = tuple[float, float]
"""Low and high."""


@dataclass(frozen=True)
class Intervals:
    """Percentile intervals, IoU from 0 to 1."""

    miou: Ends
    fb_iou: Ends
    class_iou: dict[int, Ends]
    """By class id; only classes that have a pixel in truth or prediction."""


@dataclass(frozen=True)
class Difference:
    """The first's number less the second's on the same episodes; IoU from 0 to 1."""

    miou: float
    """Difference of the two mIoU (of a class: IoU)."""
    low: float
    high: float
    p_value: float
    """Two-sided: how likely so large a difference is where there is none; 2 / (samples + 1) or more."""

    @property
    def half_width(self) -> float:
        """Of the interval: what stands behind ±."""
        return (self.high - self.low) / 2

    @property
    def shown(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Differences:
    """A difference, and where it comes from.

    Each fold and class is a test of its own: of twenty classes without any difference, one is expected to show one.
    """

    mean: Difference
    """Of the mean over the folds."""
    folds: tuple[Difference, ...]
    classes: tuple[dict[int, Difference], ...]
    """Of each fold by class id; only classes that have a pixel in both."""


def bootstrap(
    outcomes: Outcomes, classes: Sequence[int], samples: int, seed: int = 0, level: float = LEVEL
) -> Intervals:
    """Intervals of one fold's mIoU, FB-IoU and IoU of each of `classes`.

    A class without any pixel in a resample is left out of that resample's mean, as `mshnet.metrics` does. Where every
    class has one episode, all resamples are alike and the intervals have no width: they say nothing then.
    """
    sums = _resampled(_tallies(outcomes), outcomes.class_ids, classes, _Resampling(samples, seed))
    whole = sum_by_class(outcomes.counts, outcomes.class_ids.tolist(), classes)
    iou = _class_iou(sums)
    return Intervals(
        miou=_ends(_miou(sums), level),
        fb_iou=_ends(_fb_iou(sums), level),
        class_iou={c: _ends(iou[:, row], level) for row, c in enumerate(classes) if whole.union[row, 1]},
    )


def bootstrap_mean(
    folds: Sequence[tuple[Outcomes, Sequence[int]]], samples: int, seed: int = 0, level: float = LEVEL
) -> tuple[Ends, Ends]:
    """Intervals of the plain mean over folds (outcomes and classes of each): mIoU's, FB-IoU's."""
    _one_or_more(len(folds), "fold")
    mean_miou, mean_fb_iou = np.zeros(samples), np.zeros(samples)
    for position, (outcomes, classes) in enumerate(folds):
        resampling = _Resampling(samples, seed, position)
        sums = _resampled(_tallies(outcomes), outcomes.class_ids, classes, resampling)
        mean_miou += _miou(sums) / len(folds)
        mean_fb_iou += _fb_iou(sums) / len(folds)
    return _ends(mean_miou, level), _ends(mean_fb_iou, level)


def paired(
    folds: Sequence[tuple[Outcomes, Outcomes, Sequence[int]]], samples: int, seed: int = 0, level: float = LEVEL
) -> Difference:
    """The first's mean mIoU over the folds less the second's; each fold has two outcomes and its classes.

    Both are judged on the same resampled episodes: what makes an episode hard is hard for both and falls out of the
    difference, so this finds smaller differences than two separate intervals. Raises InputError where a fold's two
    outcomes are not of the same episodes.
    """
    return paired_in_detail(folds, samples, seed, level).mean


def paired_in_detail(
    folds: Sequence[tuple[Outcomes, Outcomes, Sequence[int]]], samples: int, seed: int = 0, level: float = LEVEL
) -> Differences:
    """As `paired`, with each fold and each of its classes from the same resamples."""
    _one_or_more(len(folds), "fold")
    mean, point, by_fold, by_class = np.zeros(samples), 0.0, [], []
    for position, (a, b, classes) in enumerate(folds):
        sums = _resampled_pair(a, b, classes, _Resampling(samples, seed, position))
        wholes = [sum_by_class(x.counts, x.class_ids.tolist(), classes) for x in (a, b)]
        resampled, difference = _miou(sums[0]) - _miou(sums[1]), miou(wholes[0]) - miou(wholes[1])
        mean += resampled / len(folds)
        point += difference / len(folds)
        by_fold.append(_difference(difference, resampled, level))
        resampled_iou = _class_iou(sums[0]) - _class_iou(sums[1])
        rows = zip(classes, class_iou(wholes[0]), class_iou(wholes[1]), resampled_iou.T, strict=True)
        by_class.append({c: _difference(x - y, values, level) for c, x, y, values in rows if not np.isnan(x - y)})
    return Differences(_difference(point, mean, level), tuple(by_fold), tuple(by_class))


def by_size(outcomes: Outcomes, classes: Sequence[int]) -> dict[str, tuple[float, int]]:
    """mIoU and number of the episodes whose object has each of SIZES; only sizes that occur.

    The size is the object's share of the query's pixels that count, so it does not depend on the resolution. Episodes
    whose object lies in ignored pixels alone are small.
    """
    share = outcomes.object_px / np.maximum(outcomes.counted_px, 1)
    limits = list(SIZES.values())[:-1]
    size = np.searchsorted(limits, share, side="right")
    found = {}
    for position, name in enumerate(SIZES):
        chosen = size == position
        if chosen.any():
            found[name] = (_whole_miou(_selected(outcomes, chosen), classes), int(chosen.sum()))
    return found


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over the seeds, n - 1 in the denominator; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def concatenated(parts: Sequence[Outcomes]) -> Outcomes:
    """The episodes of all parts, in order. InputError without parts."""
    _one_or_more(len(parts), "table of outcomes")
    return Outcomes(
        Counts(
            np.concatenate([part.counts.intersection for part in parts]),
            np.concatenate([part.counts.union for part in parts]),
        ),
        np.concatenate([part.class_ids for part in parts]),
        np.concatenate([part.object_px for part in parts]),
        np.concatenate([part.counted_px for part in parts]),
    )


def by_query(outcomes: Outcomes, queries: Sequence[str]) -> Outcomes:
    """A row per class and query with the sums of its episodes: the same IoU, but queries are what is resampled then.

    Episodes of one query with other supports are not independent. Over episodes, an interval says how the number
    varies with the draw; over queries, how it varies with the images, which is more.
    """
    rows = np.unique(np.array(queries, dtype=np.str_), return_inverse=True)[1].reshape(-1)
    pairs = np.stack([outcomes.class_ids, rows], axis=1)
    kinds, row = np.unique(pairs, axis=0, return_inverse=True)
    columns = np.hstack([_tallies(outcomes), outcomes.object_px[:, None], outcomes.counted_px[:, None]])
    sums = np.zeros((len(kinds), columns.shape[1]), dtype=np.int64)
    np.add.at(sums, row.reshape(-1), columns)
    return Outcomes(Counts(sums[:, :2], sums[:, 2:4]), kinds[:, 0], sums[:, 4], sums[:, 5])


# Inside ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Resampling:
    samples: int
    seed: int
    position: int = 0
    """Of the fold: folds that share a class are still drawn apart."""

    def __post_init__(self) -> None:
        _one_or_more(self.samples, "bootstrap sample")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"expected a seed from 0 to 2^64 - 1, got {self.seed}")


def _one_or_more(count: int, what: str) -> None:
    if count < 1:
        raise InputError(f"expected at least one {what}, got {count}")


def _resampled(
    tallies: Int64[np.ndarray, "n m"],
    class_ids: Int64[np.ndarray, " n"],
    classes: Sequence[int],
    resampling: _Resampling,
) -> Int64[np.ndarray, "samples classes m"]:
    """Sums per class of each resample. A class's draws depend on seed, fold and class id alone."""
    if unknown := set(class_ids.tolist()) - set(classes):
        raise KeyError(f"episodes of the classes {sorted(unknown)}, which are not among {list(classes)}")
    sums = np.zeros((resampling.samples, len(classes), tallies.shape[1]), dtype=np.int64)
    for row, class_id in enumerate(classes):
        # In floating point for the fast product; exact, since sums of pixels stay far below 2^53.
        members = tallies[class_ids == class_id].astype(np.float64)
        n = len(members)
        if not n:
            continue
        key = np.array([resampling.seed, resampling.position << 32 | class_id], dtype=np.uint64)
        bits = np.random.Philox(key=key)
        step = max(1, _AT_ONCE // n)
        for start in range(0, resampling.samples, step):
            count = min(step, resampling.samples - start)
            times = _times_drawn(bits.random_raw(count * n), count, n)
            sums[start : start + count, row] = times @ members
    return sums


def _times_drawn(raw: np.ndarray, count: int, n: int) -> Float64[np.ndarray, "count n"]:
    """How often each of n episodes is drawn in n draws: `count` rows of multinomial counts."""
    episode = ((raw >> 32) * n >> 32).astype(np.int64).reshape(count, n)  # upper bits times n: less than 1 in 2^32 off
    episode += np.arange(count)[:, None] * n
    return np.bincount(episode.ravel(), minlength=count * n).reshape(count, n).astype(np.float64)


def _resampled_pair(
    a: Outcomes, b: Outcomes, classes: Sequence[int], resampling: _Resampling
) -> tuple[Int64[np.ndarray, "samples classes 4"], Int64[np.ndarray, "samples classes 4"]]:
    for name in ("class_ids", "object_px", "counted_px"):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            raise InputError(
                f"expected two outcomes of the same episodes, found {len(a)} and {len(b)} episodes that differ in "
                f"{name}; evaluate both under the same protocol"
            )
    sums = _resampled(np.hstack([_tallies(a), _tallies(b)]), a.class_ids, classes, resampling)
    return sums[..., :4], sums[..., 4:]


def _tallies(outcomes: Outcomes) -> Int64[np.ndarray, "n 4"]:
    """Intersections of background and foreground, then unions."""
    return np.hstack([outcomes.counts.intersection, outcomes.counts.union])


def _class_iou(sums: Int64[np.ndarray, "samples classes 4"]) -> Float64[np.ndarray, "samples classes"]:
    """nan for a class without any pixel, as `mshnet.metrics.class_iou`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 1] / sums[..., 3])


def _miou(sums: Int64[np.ndarray, "samples classes 4"]) -> Float64[np.ndarray, " samples"]:
    iou = _class_iou(sums)
    present = ~np.isnan(iou)
    return np.asarray(np.where(present, iou, 0.0).sum(1) / np.maximum(present.sum(1), 1))


def _fb_iou(sums: Int64[np.ndarray, "samples classes 4"]) -> Float64[np.ndarray, " samples"]:
    both = sums.sum(1)
    return np.asarray((both[:, :2] / np.maximum(both[:, 2:], 1)).mean(1))


def _whole_miou(outcomes: Outcomes, classes: Sequence[int]) -> float:
    return miou(sum_by_class(outcomes.counts, outcomes.class_ids.tolist(), classes))


def _selected(outcomes: Outcomes, chosen: np.ndarray) -> Outcomes:
    counts = Counts(outcomes.counts.intersection[chosen], outcomes.counts.union[chosen])
    return Outcomes(counts, outcomes.class_ids[chosen], outcomes.object_px[chosen], outcomes.counted_px[chosen])


def _ends(values: Float64[np.ndarray, " samples"], level: float) -> Ends:
    if not 0 < level < 1:
        raise InputError(f"expected a level between 0 and 1, such as 0.95, got {level}")
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _difference(point: float, resampled: Float64[np.ndarray, " samples"], level: float) -> Difference:
    low, high = _ends(resampled, level)
    known = resampled[~np.isnan(resampled)]
    beyond = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return Difference(point, low, high, min(1.0, 2 * (beyond + 1) / (len(known) + 1)))
