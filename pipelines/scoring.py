"""What one way of segmenting reached on a fold, as the record that tables and reports read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.results import Interval, Score, SizeScore

if TYPE_CHECKING:
    from mshnet.outcomes import Outcomes


def score(by_seed: Sequence[Outcomes], classes: Sequence[int], names: Sequence[str], samples: int) -> Score:
    """The score on the episodes of all seeds together, with intervals.

    Args:
        by_seed: Outcomes of each seed's episodes, in the protocol's order.
        classes: Ids of the fold's tested classes.
        names: Of all classes, by class id, as in the image store's manifest.
        samples: Of the bootstrap; 0 leaves the intervals out.
    """
    import math

    from mshnet.metrics import class_iou, fb_iou, miou, sum_by_class
    from mshnet.statistics import bootstrap, by_size, concatenated

    outcomes = concatenated(by_seed)
    sums = [sum_by_class(part.counts, part.class_ids.tolist(), classes) for part in (outcomes, *by_seed)]
    values = zip(classes, class_iou(sums[0]), strict=True)
    intervals = bootstrap(outcomes, classes, samples) if samples else None
    return Score(
        miou=miou(sums[0]),
        fb_iou=fb_iou(sums[0]),
        class_iou={names[c]: value for c, value in values if not math.isnan(value)},
        episodes=len(outcomes),
        miou_interval=_interval(intervals.miou) if intervals else None,
        fb_iou_interval=_interval(intervals.fb_iou) if intervals else None,
        class_interval={names[c]: _interval(ends) for c, ends in intervals.class_iou.items()} if intervals else {},
        by_size={
            size: SizeScore(miou=value, episodes=episodes)
            for size, (value, episodes) in by_size(outcomes, classes).items()
        },
        by_seed=tuple(miou(part) for part in sums[1:]),
    )


def _interval(ends: tuple[float, float]) -> Interval:
    return Interval(low=ends[0], high=ends[1])
