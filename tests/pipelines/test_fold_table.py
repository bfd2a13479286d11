"""The fold table's rows and its text: intervals where they are known, and whose numbers it shows."""

from __future__ import annotations

import dataclasses

import pytest

from pipelines.fold_table import fact_table, facts, fold_table_text, setting, table_rows
from pipelines.results import CrossValidation, Interval, mean
from tests.pipelines.tracked_runs import configuration, folds

MIOU = (0.671, 0.72, 0.588, 0.611)


def result(architecture: str = "mshnet", **changes: object) -> CrossValidation:
    config = configuration()
    found = folds(config, MIOU)
    return dataclasses.replace(
        CrossValidation(
            name="",
            dataset="pascal",
            backbone="resnet50",
            similarity="both",
            shot=1,
            image_size_px=473,
            folds=found,
            mean_miou=mean(list(MIOU)),
            mean_fb_iou=0.785,
            parent_run_id="",
            config={},
            fingerprints={},
            git_commit="",
            versions={},
            learnable_parameters=29_626_952,
            architecture=architecture,
            miou_interval=Interval(low=0.64, high=0.655),
        ),
        **changes,  # type: ignore[arg-type]
    )


def test_intervals_are_in_percent_and_stand_under_our_row() -> None:
    row = table_rows(result())[0]
    low_high = [(known.low, known.high) if known else None for known in row.intervals]
    assert low_high[:5] == [
        pytest.approx(pair) for pair in [(65.7, 68.4), (70.6, 73.3), (57.4, 60.1), (59.7, 62.4), (64.0, 65.5)]
    ]
    assert low_high[5] is None
    lines = fold_table_text(result()).splitlines()
    assert lines[4].split() == ["MSHNet,", "trained", "67.1", "72.0", "58.8", "61.1", "64.8", "78.5"]
    assert lines[5].replace(", ", "-").split() == [
        *("95", "%", "interval", "[65.7-68.4]", "[70.6-73.3]", "[57.4-60.1]", "[59.7-62.4]", "[64.0-65.5]", "–"),
    ]
    assert len({len(line) for line in lines[1:]}) == 1, "aligned"


def test_without_intervals_there_is_no_row_for_them() -> None:
    bare = [dataclasses.replace(f, score=dataclasses.replace(f.score, miou_interval=None)) for f in result().folds]
    without = result(folds=bare, miou_interval=None)
    assert table_rows(without)[0].intervals == ()
    assert "interval" not in fold_table_text(without)


def test_another_network_has_its_own_name_and_not_the_paper_s_row() -> None:
    other = result("panet")
    assert setting(other) == "pascal, resnet50, PANet, 1-shot, 473 px, 4 of 4 folds"
    assert table_rows(other)[0].label == "PANet, trained"
    assert "paper" not in {row.key for row in table_rows(other)}
    assert setting(result()) == "pascal, resnet50, both similarities, 1-shot, 473 px, 4 of 4 folds"


def test_the_facts_beside_the_number_are_the_protocol_s() -> None:
    found = {fact.name: fact.here for fact in facts(result())}
    assert found["test episodes"] == "published draw, 1000 episodes, 1-shot, square 473 px"
    assert found["split lists"] == "lists:4f2c1a9be07d"
    assert found["training images with a novel class"] == "left out"


def test_beside_ones_own_data_nothing_is_said_of_the_paper() -> None:
    own = result(dataset="coco-json", config={"own": {"data_name": "parts", "fold_count": 7}})
    assert setting(own) == "parts, resnet50, both similarities, 1-shot, 473 px, 4 of 7 folds"
    assert setting(result(dataset="fss", config={"own": {"data_name": "", "fold_count": 1}})).startswith("fss, ")
    assert "paper" not in fold_table_text(own)
    header, rows = fact_table(own)
    assert (header, rows[0][0], len(rows[0])) == (["", "here"], "test episodes", 2)
    other = result(dataset="shapes")
    assert "not in the paper" in fold_table_text(other)
    assert fact_table(other)[0] == ["", "here", "paper"]
