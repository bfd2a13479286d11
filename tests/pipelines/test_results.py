from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given

from mshnet.errors import InputError
from mshnet.protocols import Protocol
from pipelines.results import CHOSEN_ON_TEST, CrossValidation, EpochRecord, FoldResult, Score, mean
from tests.mshnet.test_protocols import protocols
from tests.pipelines.cross_validation_example import cross_validation_example


def epoch(**changes: Any) -> EpochRecord:
    values: dict[str, Any] = {
        "epoch": 1, "step": 20, "loss": 0.7, "outer_loss": 0.4, "inner_loss": 1.0,
        "learning_rate": 0.01, "episodes_per_s": 12.5, "validation_miou": None,
    }  # fmt: skip
    return EpochRecord(**(values | changes))


def test_a_whole_cross_validation_survives_json() -> None:
    result, _ = cross_validation_example()
    text = result.to_text()
    again = CrossValidation.from_json(json.loads(text))
    assert again == result
    assert again.folds[2].history[3].loss == result.folds[2].history[3].loss
    assert CrossValidation.from_json(text) == result
    assert FoldResult.from_json(result.folds[0].to_json()) == result.folds[0]


@given(protocols)
def test_a_protocol_survives_json_with_its_label(protocol: Protocol) -> None:
    fold = dataclasses.replace(cross_validation_example()[0].folds[0], protocol=protocol)
    again = FoldResult.from_json(fold.to_text())
    assert again == fold
    assert again.protocol.label == protocol.label


def test_a_number_chosen_on_one_of_several_seeds_is_chosen_on_the_test() -> None:
    fold = cross_validation_example()[0].folds[0]
    for selection, on_test in [(CHOSEN_ON_TEST, True), (f"{CHOSEN_ON_TEST} (of seed 0)", True), ("last epoch", False)]:
        labelled = dataclasses.replace(fold, protocol=dataclasses.replace(fold.protocol, selection=selection))
        assert labelled.chosen_on_test == on_test


@pytest.mark.parametrize(("value", "written"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_a_diverged_loss_is_kept_as_standard_json(value: float, written: str) -> None:
    record = epoch(loss=value)
    assert record.to_json()["loss"] == written
    assert json.loads(record.to_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = EpochRecord.from_json(record.to_text()).loss
    assert again == value or (math.isnan(again) and math.isnan(value))


def test_whole_numbers_are_floats_where_floats_are_expected() -> None:
    score = Score.from_json({"miou": 1, "fb_iou": 0, "class_iou": {"cat": 1}, "episodes": 3})
    assert (score.miou, type(score.miou), type(score.class_iou["cat"])) == (1.0, float, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": 2.5}, r"Score\.episodes: expected int, got float"),
        ({"episodes": True}, r"Score\.episodes: expected int, got bool"),
        ({"miou": "0.5"}, r"Score\.miou: expected float, got str"),
        ({"miou": None}, r"Score\.miou: expected float, got NoneType"),
        ({"class_iou": [1.0]}, r"Score\.class_iou: expected dict, got list"),
        ({"class_iou": {"cat": "x"}}, r"Score\.class_iou\['cat'\]: expected float, got str"),
        ({"spread": 0.1}, r"unknown \['spread'\]"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    good = {"miou": 0.5, "fb_iou": 0.6, "class_iou": {"cat": 0.5}, "episodes": 3}
    with pytest.raises(InputError, match=message):
        Score.from_json(good | change)


def test_the_place_of_a_wrong_value_deep_inside_is_named() -> None:
    data = cross_validation_example()[0].to_json()
    del data["folds"][1]["history"][2]["loss"]
    with pytest.raises(InputError, match=r"CrossValidation\.folds\[1\]\.history\[2\].*missing \['loss'\]"):
        CrossValidation.from_json(data)


def test_what_is_not_json_or_not_an_object_is_refused() -> None:
    with pytest.raises(InputError, match="not JSON"):
        Score.from_json("{")
    with pytest.raises(InputError, match="expected an object with the fields of Score, got list"):
        Score.from_json("[]")


def test_baseline_means_need_every_fold() -> None:
    result, _ = cross_validation_example()
    expected = sum(fold.baselines["foreground"].miou for fold in result.folds) / 4
    assert result.baseline_miou("foreground") == pytest.approx(expected, abs=1e-12)
    without = dataclasses.replace(result.folds[0], baselines={})
    assert dataclasses.replace(result, folds=[without, *result.folds[1:]]).baseline_miou("foreground") is None
    assert dataclasses.replace(result, folds=[]).baseline_miou("foreground") is None


def test_mean_is_the_plain_mean_and_refuses_nothing() -> None:
    assert mean([0.25, 0.5]) == 0.375
    with pytest.raises(InputError, match="at least one fold"):
        mean([])
