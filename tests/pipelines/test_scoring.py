"""A fold's score against numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mshnet.metrics import Counts
from mshnet.outcomes import Outcomes
from mshnet.statistics import bootstrap, concatenated
from pipelines.results import Score
from pipelines.scoring import score

NAMES = [f"class {c}" for c in range(20)]


def outcomes(rows: list[tuple[int, int, int]]) -> Outcomes:
    """From (class, intersection, union) of each episode's foreground; 100 pixels count, the rest is background."""
    class_ids, inside, union = np.array(rows, dtype=np.int64).T
    counts = Counts(np.stack([100 - union, inside], axis=1), np.stack([100 - inside, union], axis=1))
    return Outcomes(counts, class_ids, inside, np.full(len(rows), 100))


FIRST = outcomes([(5, 4, 10), (5, 10, 10), (6, 30, 60)])
SECOND = outcomes([(5, 10, 20), (6, 0, 40), (6, 10, 20)])


def test_numbers_by_hand() -> None:
    found = score([FIRST, SECOND], (5, 6, 7), NAMES, samples=100)
    assert found.class_iou == {"class 5": 24 / 40, "class 6": 40 / 120}  # none of class 7, which has no episode
    assert found.miou == pytest.approx((24 / 40 + 40 / 120) / 2)
    assert found.fb_iou == pytest.approx((64 / 160 + 440 / 536) / 2)
    assert found.episodes == 6
    assert found.by_seed == pytest.approx(((14 / 20 + 30 / 60) / 2, (10 / 20 + 10 / 60) / 2))
    assert {size: (x.miou, x.episodes) for size, x in found.by_size.items()} == {
        "small": (pytest.approx((4 / 10 + 0 / 40) / 2), 2),
        "medium": (pytest.approx((20 / 30 + 10 / 20) / 2), 3),
        "large": (30 / 60, 1),
    }
    intervals = bootstrap(concatenated([FIRST, SECOND]), (5, 6, 7), 100)
    assert found.miou_interval is not None
    assert found.fb_iou_interval is not None
    assert (found.miou_interval.low, found.miou_interval.high) == intervals.miou
    assert (found.fb_iou_interval.low, found.fb_iou_interval.high) == intervals.fb_iou
    assert {n: (x.low, x.high) for n, x in found.class_interval.items()} == {
        NAMES[c]: ends for c, ends in intervals.class_iou.items()
    }
    assert Score.from_json(found.to_text()) == found


def test_without_a_bootstrap() -> None:
    found = score([FIRST], (5, 6), NAMES, samples=0)
    assert (found.miou_interval, found.fb_iou_interval, found.class_interval) == (None, None, {})
    assert found.by_seed == (found.miou,)
