"""Which of an experiment's runs fill a table, and why the others do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mshnet.config import TrainingConfig
from mshnet.errors import InputError
from pipelines.cells import TABLES
from pipelines.chosen_runs import Asked, Chosen, Key, check, choose
from pipelines.results import CHOSEN_ON_TEST
from pipelines.tracking_search import TrackedRun
from tests.pipelines.tracked_runs import configuration, tracked

MIOU = (0.65, 0.70, 0.61, 0.60)
ONE_SHOT = Key("resnet50", "both", "mshnet", 1)


def chosen(*runs: TrackedRun, table: int = 2, **asked: Any) -> Chosen:
    """Of runs in the order in which they were started."""
    return choose(TABLES[table], runs[::-1], Asked(**asked))


def why(found: Chosen) -> dict[str, str]:
    return {apart.run.run_id: apart.why for apart in found.apart}


def test_the_newest_of_a_cell_is_shown_and_the_older_one_set_apart() -> None:
    found = chosen(tracked(configuration(), MIOU, "old"), tracked(configuration(), MIOU, "new"))
    assert {key: run.run_id for key, run in found.runs.items()} == {ONE_SHOT: "new"}
    assert why(found) == {"old": "older than the run shown"}


def test_a_newer_run_of_fewer_folds_hides_none_of_all_four() -> None:
    found = chosen(tracked(configuration(), MIOU, "whole"), tracked(configuration(), MIOU[:1], "a fold"))
    assert found.runs[ONE_SHOT].run_id == "whole"
    assert why(found) == {"a fold": "fewer folds than the run shown"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"resize": "original"}, "image size: 473 px square, judged at original size, not 473 px square"),
        ({"episodes": 100, "name": "published draw, 100 episodes"}, "test episodes: published draw, 100 episodes"),
        ({"seeds": (0, 1), "name": "published draw, 1000 episodes, 2 seeds"}, "2 seeds, not published (1,000 ep"),
        ({"side_px": 65}, "image size: 65 px square, not 473 px square"),
        ({"ignore": "background"}, "ignored pixels: background, not left out of the counts"),
        ({"mask_mode": "another"}, "masks: another, not class label map"),
        ({"split_lists": "objects of 2048 pixels and more"}, "split lists: objects of 2048 pixels and more, not the"),
        ({"novel_removed": False}, "training images with a novel class: kept, not left out"),
        ({"selection": CHOSEN_ON_TEST}, f"checkpoint: {CHOSEN_ON_TEST}, not best epoch on held-out base classes"),
        ({"weights": "random"}, "backbone weights: random, not imagenet"),
        ({"data": "e" * 64}, "data: fingerprint eeeeeeeeeeee, not fingerprint d1d1d1d1d1d1"),
    ],
)
def test_what_was_measured_otherwise_never_stands_in_the_same_table(changes: dict[str, Any], told: str) -> None:
    alike = [tracked(configuration(shot=shot), MIOU, f"{shot}-shot") for shot in (1, 5)]
    other = tracked(configuration(backbone="resnet101"), MIOU, "other", **changes)
    found = chosen(*alike, other)
    assert {run.run_id for run in found.runs.values()} == {"1-shot", "5-shot"}
    assert why(found)["other"].startswith("measured otherwise: ")
    assert told in why(found)["other"]


def test_classes_that_could_not_be_tested_and_the_lists_hash_are_the_folds_own() -> None:
    other = tracked(configuration(shot=5), MIOU, "other", split_lists="lists:ffffff", classes="4 of 5 classes")
    assert len(chosen(tracked(configuration(), MIOU, "one"), other).runs) == 2


def test_of_two_ways_of_measuring_the_one_that_fills_more_is_shown_unless_another_is_asked_for() -> None:
    runs = [
        tracked(configuration(), MIOU, "a"),
        tracked(configuration(shot=5), MIOU, "b"),
        tracked(configuration(), MIOU, "c", resize="original"),
    ]
    assert {run.run_id for run in chosen(*runs).runs.values()} == {"a", "b"}
    found = chosen(*runs, resize="original")
    assert {run.run_id for run in found.runs.values()} == {"c"}
    assert why(found) == dict.fromkeys("ab", "resize: square, asked for was original")
    assert dict(found.measured)["image size"] == "473 px square, judged at original size"


def test_a_recipe_that_is_asked_for_leaves_out_what_was_trained_otherwise() -> None:
    short = configuration(shot=5, training=dataclasses.replace(TrainingConfig(), epochs=1))
    found = chosen(tracked(configuration(), MIOU, "paper's"), tracked(short, MIOU, "short"), recipe="paper")
    assert [run.run_id for run in found.runs.values()] == ["paper's"]
    assert why(found) == {"short": "not the recipe paper: training.epochs 1, not 300"}


def test_a_run_without_an_end_is_named_only_where_there_is_none_with_one() -> None:
    failed = tracked(configuration(), (), "failed", status="FAILED")
    found = chosen(failed, tracked(configuration(shot=5), (), "running", status="RUNNING"))
    assert {key.shot: run.status for key, run in found.unfinished.items()} == {1: "FAILED", 5: "RUNNING"}
    assert (found.runs, found.measured) == ({}, ())
    found = chosen(failed, tracked(configuration(), MIOU, "whole"))
    assert (found.unfinished, why(found)) == ({}, {"failed": "failed"})


def test_a_table_takes_its_own_data_set_similarities_and_shots_and_any_other_network() -> None:
    runs = [
        tracked(configuration(dataset="coco"), MIOU, "coco"),
        tracked(configuration(similarity="cosine"), MIOU, "cosine"),
        tracked(configuration(shot=2), MIOU, "2-shot"),
        tracked(configuration(architecture="panet"), MIOU, "panet"),
    ]
    assert {run.run_id for run in chosen(*runs).runs.values()} == {"panet"}
    assert {run.run_id for run in chosen(*runs, table=3).runs.values()} == {"coco"}
    assert {run.run_id for run in chosen(*runs, table=4).runs.values()} == {"panet", "cosine"}


@pytest.mark.parametrize("asked", [Asked(recipe="mine"), Asked(resize="round"), Asked(selection="best")])
def test_a_word_that_no_run_can_have_is_refused(asked: Asked) -> None:
    with pytest.raises(InputError, match=r"must be one of .*, or left out, got"):
        check(asked)
