"""Is one run better than another? A paired test on the episodes that both were judged on.

python -m pipelines.compare outputs/a/cross_validation.json outputs/b/cross_validation.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mshnet.command_line import run
from mshnet.errors import InputError
from pipelines.results import Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mshnet.outcomes import Judged, Outcomes
    from mshnet.statistics import Difference, Differences
    from pipelines.judged_run import JudgedFold, JudgedRun

    Part = tuple[Outcomes, Outcomes, Sequence[int]]
    """A's and B's outcomes of a fold, and its classes."""

PROG = "python -m pipelines.compare"
FEW = 10
"""Episodes (queries) of a class: with fewer, a bootstrap's interval is too narrow."""
_SHOWN_DIFFERENCES = 6
Unit = Literal["episodes", "queries"]
"""What is drawn again in a resample."""
_NO_COVER = "The interval is about these episodes; another training seed may differ by more (docs/statistics.md)."


@dataclass(frozen=True, kw_only=True)
class Measured(Record):
    """A's number, B's, and A's less B's with its 95 % interval; mIoU or IoU from 0 to 1."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class FoldComparison(Record):
    """One fold."""

    fold: int
    episodes: int
    miou: Measured
    class_iou: dict[str, Measured]
    """By class name; each is a test of its own."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """What the command found: its last line on stdout."""

    a: str
    b: str
    protocol: str
    episodes: int
    """Of all folds."""
    resampled: str
    """episodes or queries."""
    miou: Measured
    """Means over the folds."""
    verdict: str
    folds: list[FoldComparison]
    notes: list[str]


def compare(
    a: Annotated[str, tyro.conf.arg(metavar="A")],
    b: Annotated[str, tyro.conf.arg(metavar="B")] = "",
    /,
    predictor: str = "trained",
    baseline: str = "",
    shot: int = 0,
    folds: tuple[int, ...] = (),
    resample: Unit = "episodes",
    samples: int = 10_000,
    seed: int = 0,
    tracking_uri: str = "",
) -> None:
    """Test whether run A is better than run B, both judged on the same episodes.

    A and B are each the URI of a cross_validation.json (or the report's folder), or the id of a cross-validation's
    parent run in MLflow. The same resampled episodes serve both (a paired bootstrap, within each class), so that what
    makes an episode hard falls out of the difference. Runs whose episodes differ are refused. The table and the
    sentence go to stderr, one line of JSON to stdout.

    Args:
        a: The first run.
        b: The second run; left out: the first again, to hold it against a baseline (A --baseline prototype).
        predictor: Who is judged in A: trained, untrained, foreground or prototype.
        baseline: Who is judged in B; empty: the same as in A.
        shot: Supports per episode; 0: A's own.
        folds: Folds to compare; none: all that both have.
        resample: episodes: would another draw of episodes from these images say the same? queries: would other
            images? A query's episodes stay together then, which gives wider intervals.
        samples: Resamples of the bootstrap; the smallest p-value is 2 / (samples + 1).
        seed: Of the bootstrap.
        tracking_uri: Where run ids are looked up; empty: MLFLOW_TRACKING_URI, else outputs/mlflow.db.
    """
    from pipelines.judged_run import read_run

    if not b and baseline in ("", predictor):
        raise InputError("expected a second run, or --baseline to hold the run against, got neither")
    first = read_run(a, tracking_uri)
    second = read_run(b, tracking_uri) if b else first
    sides = (Side(first, predictor), Side(second, baseline or predictor))
    result = compared(*sides, shot=shot or first.shot, folds=folds, unit=resample, samples=samples, seed=seed)
    print(text(result), file=sys.stderr)
    print(result.to_text())


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    run: JudgedRun
    predictor: str

    @property
    def label(self) -> str:
        """For the table's head."""
        return f"{self.predictor}, {self.run.name} ({self.run.place})"


def compared(a: Side, b: Side, *, shot: int, folds: Sequence[int], unit: Unit, samples: int, seed: int) -> Comparison:
    """The paired test over the folds that both have. InputError where the episodes are not the same."""
    from mshnet.data.folds import class_names
    from mshnet.statistics import paired_in_detail

    chosen = _folds(a.run, b.run, folds)
    pairs = _pairs(a, b, shot, chosen)
    episodes = [len(first) for first, _ in pairs]
    if unit == "queries":
        pairs = [_by_query(a.run.folds[f].of(a.predictor, shot), pair) for f, pair in zip(chosen, pairs, strict=True)]
    parts = [(*pair, sorted(set(pair[0].class_ids.tolist()))) for pair in pairs]
    _refuse_single(parts, unit)
    found = paired_in_detail(parts, samples, seed)
    names = a.run.folds[chosen[0]].class_names or class_names(a.run.dataset)
    rows = [
        FoldComparison(fold=fold, episodes=count, miou=miou, class_iou={names[c]: x for c, x in by_class.items()})
        for fold, count, (miou, by_class) in zip(chosen, episodes, _measured_folds(parts, found), strict=True)
    ]
    means = [sum(values) / len(rows) for values in ([row.miou.a for row in rows], [row.miou.b for row in rows])]
    drawn = f"{sum(episodes):,} episodes" if unit == "episodes" else f"the queries of {sum(episodes):,} episodes"
    return Comparison(
        a=a.label,
        b=b.label,
        protocol=replace(a.run.folds[chosen[0]].protocol, shot=shot).label,
        episodes=sum(episodes),
        resampled=unit,
        miou=_measured(means[0], means[1], found.mean),
        verdict=verdict(found.mean, drawn),
        folds=rows,
        notes=_notes(a, b, chosen, parts, unit),
    )


def verdict(difference: Difference, drawn: str) -> str:
    """The sentence, in mIoU points (percent); `drawn` is what was resampled, such as "1,000 episodes"."""
    points, half = 100 * difference.miou, 100 * difference.half_width
    digits = 2 if 0 < half < 0.1 else 1
    p = "p < 0.001" if difference.p_value < 0.0005 else f"p = {difference.p_value:.3f}"
    how = f"{half:.{digits}f} mIoU points (95 %, paired bootstrap over {drawn}, {p})"
    if difference.shown:
        return f"A is {'better' if difference.low > 0 else 'worse'} than B by {abs(points):.{digits}f} ± {how}"
    points = round(points, digits) + 0.0  # no minus before a zero
    return f"no difference that these episodes could show: A less B is {points:.{digits}f} ± {how}"


def text(result: Comparison) -> str:
    """Table, notes and sentence for a terminal."""
    width = max([len("mean of 4 folds"), *(len(name) + 2 for fold in result.folds for name in fold.class_iou)])
    head = f"{'mIoU, %':<{width}}  {'A':>5}  {'B':>5}  {'A - B':>6}  {'95 %':>15}  {'p':>7}"
    rule = "-" * len(head)
    lines = [f"A: {result.a}", f"B: {result.b}", f"on: {result.protocol}", rule, head, rule]
    for fold in result.folds:
        lines.append(_line(f"fold {fold.fold}", fold.miou, width))
        lines += [_line(f"  {name}", measured, width) for name, measured in fold.class_iou.items()]
    if len(result.folds) > 1:
        lines += [rule, _line(f"mean of {len(result.folds)} folds", result.miou, width)]
    return "\n".join([*lines, rule, *(f"note: {note}" for note in result.notes), _NO_COVER, f"{result.verdict}."])


# Inside ---------------------------------------------------------------------------------------------------


def _line(label: str, x: Measured, width: int) -> str:
    ends = f"{100 * x.low:+.1f} to {100 * x.high:+.1f}"
    p = "< 0.001" if x.p_value < 0.0005 else f"{x.p_value:.3f}"
    return f"{label:<{width}}  {100 * x.a:5.1f}  {100 * x.b:5.1f}  {100 * x.difference:+6.1f}  {ends:>15}  {p:>7}"


def _measured_folds(parts: Sequence[Part], found: Differences) -> Iterator[tuple[Measured, dict[int, Measured]]]:
    """mIoU and IoU by class id of each fold."""
    from mshnet.metrics import class_iou, miou, sum_by_class

    for (first, second, classes), whole, by_class in zip(parts, found.folds, found.classes, strict=True):
        sums = [sum_by_class(x.counts, x.class_ids.tolist(), classes) for x in (first, second)]
        iou = [dict(zip(classes, class_iou(x), strict=True)) for x in sums]
        measured = {c: _measured(iou[0][c], iou[1][c], difference) for c, difference in by_class.items()}
        yield _measured(miou(sums[0]), miou(sums[1]), whole), measured


def _measured(a: float, b: float, difference: Difference) -> Measured:
    return Measured(
        a=a, b=b, difference=difference.miou, low=difference.low, high=difference.high, p_value=difference.p_value
    )


def _folds(a: JudgedRun, b: JudgedRun, wanted: Sequence[int]) -> list[int]:
    both = sorted(a.folds.keys() & b.folds.keys())
    missing = sorted(set(wanted) - set(both))
    if missing or not both:
        raise InputError(
            f"expected {f'the folds {missing}' if missing else 'a fold'} in both runs, found {sorted(a.folds)} in A "
            f"and {sorted(b.folds)} in B; evaluate the others first"
        )
    return sorted(set(wanted)) or both


def _pairs(a: Side, b: Side, shot: int, folds: Sequence[int]) -> list[tuple[Outcomes, Outcomes]]:
    """Outcomes of all seeds of each fold, once they are known to be of the same episodes."""
    from mshnet.statistics import concatenated

    differences: list[str] = []
    if a.run.dataset != b.run.dataset:
        differences.append(f"the data set is {a.run.dataset} in A, {b.run.dataset} in B")
    pairs = []
    for fold in folds:
        first, second = a.run.folds[fold], b.run.folds[fold]
        judged = first.of(a.predictor, shot), second.of(b.predictor, shot)
        found = _protocol_differences(first, second) + _list_differences(*judged)
        found = found or _support_differences(first, second, shot)
        differences += [f"fold {fold}: {difference}" for difference in found]
        pairs.append((concatenated([x.outcomes for x in judged[0]]), concatenated([x.outcomes for x in judged[1]])))
    if differences:
        more = len(differences) - _SHOWN_DIFFERENCES
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise InputError(
            f"expected two runs that were judged on the same episodes, found that {shown}. "
            "Evaluate both under the same protocol"
        )
    return pairs


def _by_query(judged: Sequence[Judged], pair: tuple[Outcomes, Outcomes]) -> tuple[Outcomes, Outcomes]:
    from mshnet.statistics import by_query

    queries = [query for each in judged for query in each.queries]
    return by_query(pair[0], queries), by_query(pair[1], queries)


def _per_class(parts: Sequence[Part]) -> list[int]:
    """How many there are of each class to draw from."""
    return [int((first.class_ids == c).sum()) for first, _, classes in parts for c in classes]


def _refuse_single(parts: Sequence[Part], unit: Unit) -> None:
    if max(_per_class(parts), default=0) < 2:
        raise InputError(
            f"expected a class with two {unit} or more, found one of each: nothing can be resampled; "
            "evaluate on more episodes"
        )


def _protocol_differences(a: JudgedFold, b: JudgedFold) -> list[str]:
    # Not the training's part of it (removed images, selection), and the square's size only where it is judged in.
    names = ["draw", "episodes", "resize", "ignore", "mask_mode", "split_lists", "classes"]
    if a.protocol.resize == b.protocol.resize == "square":
        names.append("side_px")
    pairs = [(name, getattr(a.protocol, name), getattr(b.protocol, name)) for name in names]
    return [f"{name} is {x!r} in A, {y!r} in B" for name, x, y in pairs if x != y]


def _support_differences(a: JudgedFold, b: JudgedFold, shot: int) -> list[str]:
    # The hash is of the lists at the protocol's own number of supports, and the tables name the queries alone.
    if a.protocol.shot == b.protocol.shot == shot and a.protocol.seeds == b.protocol.seeds:
        hashes = a.episodes_hash, b.episodes_hash
        if all(hashes) and hashes[0] != hashes[1]:
            return [f"the supports differ (episodes {hashes[0][:12]} in A, {hashes[1][:12]} in B)"]
    return []


def _list_differences(a: Sequence[Judged], b: Sequence[Judged]) -> list[str]:
    import numpy as np

    seeds = [x.seed for x in a], [x.seed for x in b]
    if seeds[0] != seeds[1]:
        return [f"the seeds are {seeds[0]} in A, {seeds[1]} in B"]
    found = []
    for first, second in zip(a, b, strict=True):
        where = f" (seed {first.seed})" if len(a) > 1 else ""
        x, y = first.outcomes, second.outcomes
        if len(x) != len(y):
            found.append(f"there are {len(x)} episodes in A, {len(y)} in B{where}")
        elif first.queries != second.queries:
            pairs = list(zip(first.queries, second.queries, strict=True))
            at = [i for i, (one, other) in enumerate(pairs) if one != other]
            found.append(
                f"{len(at)} of {len(x)} queries differ, first episode {at[0]}: {pairs[at[0]][0]} in A, "
                f"{pairs[at[0]][1]} in B{where}"
            )
        elif not np.array_equal(x.class_ids, y.class_ids):
            found.append(f"{int((x.class_ids != y.class_ids).sum())} of {len(x)} episodes are of another class{where}")
        elif not (np.array_equal(x.object_px, y.object_px) and np.array_equal(x.counted_px, y.counted_px)):
            found.append(f"the true masks differ for the same queries{where}")
    return found


def _notes(a: Side, b: Side, folds: Sequence[int], parts: Sequence[Part], unit: Unit) -> list[str]:
    notes = []
    left_out = sorted((a.run.folds.keys() | b.run.folds.keys()) - set(folds))
    if left_out:
        notes.append(f"folds {', '.join(map(str, left_out))} are left out")
    for what in ("selection", "novel_removed"):
        pairs = {(getattr(a.run.folds[f].protocol, what), getattr(b.run.folds[f].protocol, what)) for f in folds}
        for one, other in sorted(pairs):
            if one != other:
                notes.append(f"trained under different rules: {what} is {one!r} in A, {other!r} in B")
    few = sum(count < FEW for count in _per_class(parts))
    if few:
        notes.append(f"classes with fewer than {FEW} {unit}: {few}; the intervals are too narrow for that")
    return notes


if __name__ == "__main__":
    run(compare, PROG)
