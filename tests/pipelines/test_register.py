"""What a fold's registration records; the registry itself is tested with the tracker."""

from __future__ import annotations

import dataclasses

import pytest

from pipelines import recipes
from pipelines.draw import DrawnTest, DrawnTraining
from pipelines.register import SameRun, _description, _metrics, _params
from pipelines.results import CHOSEN_ON_TEST
from tests.pipelines.cross_validation_example import cross_validation_example


def test_a_result_counts_only_for_the_run_that_it_was_logged_to() -> None:
    result = {"run_id": "a1", "parent_run_id": "p1"}
    assert SameRun("run_id", "a1")(result)
    assert not SameRun("run_id", "b2")(result)
    assert SameRun("parent_run_id", "p1")(result)
    assert not SameRun("parent_run_id", "a1")(result)
    # A dry run starts none.
    assert SameRun("run_id", "")(result)


def test_the_metrics_are_the_folds_numbers() -> None:
    fold = cross_validation_example()[0].folds[1]
    metrics = _metrics(fold)
    scores = {
        name: metrics.pop(name)
        for name in (
            "test/miou", "test/fb_iou", "baseline_untrained/miou", "baseline_foreground/miou", "baseline_prototype/miou"
        )
    }  # fmt: skip
    assert scores == pytest.approx(
        {
            "test/miou": 0.471,
            "test/fb_iou": 0.63,
            "baseline_untrained/miou": 0.131,
            "baseline_foreground/miou": 0.196,
            "baseline_prototype/miou": 0.236,
        }
    )
    classes = {name.removeprefix("class_iou/"): v for name, v in metrics.items() if name.startswith("class_iou/")}
    assert classes == fold.score.class_iou
    assert len(classes) == 5
    assert {name: value for name, value in metrics.items() if not name.startswith("class_iou/")} == {
        "baseline_untrained/fb_iou": 0.4,
        "baseline_foreground/fb_iou": 0.4,
        "baseline_prototype/fb_iou": 0.4,
        "best_epoch": 18,
        "train_s": pytest.approx(362.2),
        "evaluate_s": 48.9,
    }


def test_a_score_on_the_episodes_that_chose_the_epoch_has_a_name_of_its_own() -> None:
    fold = dataclasses.replace(cross_validation_example()[0].folds[1], selection=CHOSEN_ON_TEST)
    metrics = _metrics(fold)
    assert metrics["test_epoch_chosen_on_test/miou"] == pytest.approx(0.471)
    assert not any(name.startswith("test/") for name in metrics)


def test_a_fold_without_a_baseline_is_an_error_not_a_gap() -> None:
    fold = cross_validation_example()[0].folds[0]
    lacking = type(fold).from_json({**fold.to_json(), "baselines": {}})
    with pytest.raises(KeyError, match="untrained"):
        _metrics(lacking)


def test_the_parameters_say_what_was_drawn_but_not_where_it_lies() -> None:
    training = DrawnTraining(
        fold=0, folder="episodes/a", store="images/b", split_lists="rule: at least 30 px", selection="last epoch",
        base_classes=(5, 6), left_out=(), training_pairs=74, removed_pairs=43,
        pairs_sha256="a" * 64, validation_sha256="b" * 64,
    )  # fmt: skip
    test = DrawnTest(
        fold=0, folder="episodes/c", store="images/b", protocol="published draw", novel_classes=(0, 1),
        left_out=("disc",), test_pairs=20, episodes_hash="e68ad4a7d8d5", episodes_sha256="c" * 64,
    )  # fmt: skip
    assert _params(training) == {
        "split_lists": "rule: at least 30 px",
        "selection": "last epoch",
        "base_classes": [5, 6],
        "training_pairs": 74,
        "removed_pairs": 43,
        "pairs_sha256": "a" * 64,
        "validation_sha256": "b" * 64,
    }
    assert _params(test) == {
        "protocol": "published draw", "novel_classes": [0, 1], "test_pairs": 20, "episodes_hash": "e68ad4a7d8d5",
        "episodes_sha256": "c" * 64,
    }  # fmt: skip


def test_the_description_names_numbers_classes_and_protocol() -> None:
    fold = cross_validation_example()[0].folds[2]
    assert _description(recipes.paper(), fold) == (
        "MSHNet (resnet50, both), pascal fold 2, 1-shot: mIoU 38.6, FB-IoU 64.0 on "
        "dining table, dog, horse, motorbike, person. Protocol: published 1000 episodes, 473×473 px. "
        "Selection: best mIoU on 3 held-out base classes. Lists: lists:4f2c1a9be07d."
    )
