"""The mean over the folds and its interval, from the tables of outcomes that the folds left on the store."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mshnet.errors import InputError
from mshnet.metrics import Counts
from mshnet.outcomes import Judged, Outcomes, write_outcomes
from mshnet.statistics import bootstrap_mean, concatenated
from pipelines import storage
from pipelines.aggregate import _mean_intervals
from pipelines.config import CrossValidationConfig, EvaluationConfig
from pipelines.results import FoldResult
from tests.pipelines.cross_validation_example import cross_validation_example


def outcomes(classes: range, seed: int) -> Outcomes:
    """Forty episodes of a fold's classes."""
    random = np.random.default_rng(seed)
    intersection = random.integers(0, 100, (40, 2))
    return Outcomes(
        Counts(intersection, intersection + random.integers(1, 100, (40, 2))),
        np.array([classes[i % len(classes)] for i in range(40)]),
        np.full(40, 100),
        np.full(40, 400),
    )


def folds(root: Path) -> list[FoldResult]:
    """Two of Pascal's, judged with two seeds, beside another number of supports and a baseline."""
    found = []
    for fold in cross_validation_example()[0].folds[:2]:
        classes = range(5 * fold.fold, 5 * fold.fold + 5)
        judged = [
            Judged(predictor, shot, seed, ("q",) * 40, outcomes(classes, 100 * fold.fold + 10 * shot + seed + penalty))
            for predictor, penalty in (("trained", 0), ("foreground", 5))
            for shot, seed in ((1, 0), (1, 1), (5, 0))
        ]
        name = f"evaluations/fold{fold.fold}/outcomes.arrow"
        sha256 = write_outcomes(storage.join(str(root), name), judged)
        found.append(dataclasses.replace(fold, outcomes=name, outcomes_sha256=sha256))
    return found


def test_the_interval_of_the_mean_is_of_the_trained_network_at_the_protocol_s_shot_on_all_seeds(tmp_path: Path) -> None:
    config = CrossValidationConfig(
        dataset="pascal", store=str(tmp_path), evaluation=EvaluationConfig(bootstrap_samples=200)
    )
    own = []
    for fold in (0, 1):
        classes = range(5 * fold, 5 * fold + 5)
        by_seed = [outcomes(classes, 100 * fold + 10 + seed) for seed in (0, 1)]
        own.append((concatenated(by_seed), list(classes)))
    expected = bootstrap_mean(own, 200)
    found = _mean_intervals(config, folds(tmp_path))
    assert [(each.low, each.high) for each in found if each] == list(expected)


def test_without_tables_there_is_no_interval_and_another_table_is_refused(tmp_path: Path) -> None:
    config = CrossValidationConfig(dataset="pascal", store=str(tmp_path))
    known = folds(tmp_path)
    assert _mean_intervals(config, [known[0], dataclasses.replace(known[1], outcomes="")]) == (None, None)
    with pytest.raises(InputError, match="sha256"):
        _mean_intervals(config, [dataclasses.replace(known[0], outcomes_sha256="0" * 64)])
