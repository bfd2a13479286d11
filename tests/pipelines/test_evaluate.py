"""Which episodes are pictured, a score's numbers, and the precision that a fold is judged at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mshnet.backbone import Features
from mshnet.checkpoint import save_model
from mshnet.engine import Evaluation
from mshnet.metrics import Counts
from pipelines import draw, preprocess, scan
from pipelines.config import EvaluationConfig
from pipelines.evaluate import _ranked, _score, evaluate_fold
from pipelines.network import build_network
from pipelines.results import FoldResult
from pipelines.train import TrainedFold
from tests.pipelines.drawn_fold import done, draw_fold, small_config


def test_the_best_the_median_and_the_worst_are_pictured() -> None:
    iou = np.array([0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2])
    queries = list(range(10, 17))
    assert _ranked(iou, queries, 1) == [("best", 1), ("median", 0), ("worst", 2)]
    # From the median (0.5) outwards; of two equally near ones, the better.
    assert _ranked(iou, queries, 2) == [
        ("best", 1), ("best", 5), ("median", 0), ("median", 3), ("worst", 2), ("worst", 6)
    ]  # fmt: skip


def test_a_query_is_pictured_once_however_often_it_is_among_the_best() -> None:
    iou = np.array([0.9, 0.8, 0.7, 0.5, 0.4, 0.2, 0.1])
    queries = [5, 5, 8, 5, 2, 8, 9]
    # The median is 5's, which is shown; then its neighbours in turn; the worst after that is 9's.
    assert _ranked(iou, queries, 1) == [("best", 0), ("median", 2), ("worst", 6)]
    shown = [queries[i] for _, i in _ranked(iou, queries, 3)]
    assert sorted(shown) == [2, 5, 8, 9]


def test_with_fewer_queries_than_places_every_query_is_pictured_once() -> None:
    assert _ranked(np.array([0.2, 0.4]), [7, 3], 3) == [("best", 1), ("best", 0)]


def test_equal_episodes_keep_their_order() -> None:
    ranked = _ranked(np.zeros(5), list(range(5)), 1)
    assert ranked == [("best", 0), ("median", 2), ("worst", 4)]


def test_a_score_sums_pixels_per_class_before_dividing() -> None:
    # Background, foreground of four episodes: two of class 7, one of 5, one of 9 without any pixel.
    intersection = np.array([[80, 10], [60, 0], [50, 30], [100, 0]])
    union = np.array([[90, 20], [100, 40], [70, 50], [100, 0]])
    outcome = Evaluation(Counts(intersection, union), (7, 7, 5, 9))
    score = _score(outcome, [5, 7, 9], [f"class {i}" for i in range(10)])
    assert score.class_iou == {"class 5": pytest.approx(30 / 50), "class 7": pytest.approx(10 / 60)}
    assert score.miou == pytest.approx((0.6 + 1 / 6) / 2)
    assert score.fb_iou == pytest.approx((290 / 360 + 40 / 110) / 2)
    assert score.episodes == 4


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_all_are_judged_on_features_of_the_trainings_precision(
    precision: Literal["float32", "bfloat16"], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        small_config(tmp_path),
        precision=precision,
        evaluation=EvaluationConfig(evaluation_episodes=5, threshold_episodes=4, panels_each=1),
    )
    drawn, scanned = draw_fold(config), scan.scan_source(config)
    tested = done(draw.test_stage(config, scanned, preprocess.stages(config, scanned), 0))
    save_model(build_network(config), str(tmp_path / "store" / "model"), {})
    trained = TrainedFold(
        fold=0, model="model", history=[], best_epoch=1, train_episodes=0, train_s=0.0, run_id="", git_commit=""
    )
    seen: list[Features] = []
    _note_features(monkeypatch, seen)
    found = evaluate_fold(config, str(tmp_path / "result"), drawn.to_json(), tested, trained.to_json())
    result = FoldResult.from_json(found)
    assert {maps.dtype for features in seen for maps in features} == {dtype}
    # Queries and supports of two batches of thresholds, two of tests, three pictures.
    assert len(seen) == 2 * (1 + 2 + 3)
    assert set(result.baselines) == {"untrained", "foreground", "prototype"}
    assert result.score == result.baselines["untrained"]  # which is what was saved
    assert {score.episodes for score in (result.score, *result.baselines.values())} == {5}


def _note_features(monkeypatch: pytest.MonkeyPatch, seen: list[Features]) -> None:
    from mshnet.features import FeatureCache

    of = FeatureCache.of

    def noted(self: FeatureCache, batch: Any) -> tuple[Features, Features]:
        found = of(self, batch)
        seen.extend(found)
        return found

    monkeypatch.setattr(FeatureCache, "of", noted)
