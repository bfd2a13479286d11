"""The matrix: the cells' configurations, what it plans, how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import matrix
from pipelines.cells import Cell, cells
from pipelines.config import CrossValidationConfig, parse
from pipelines.matrix import DESCRIPTION, PROG, MatrixArguments, configurations


def wanted(*flags: str) -> dict[Cell, CrossValidationConfig]:
    return configurations(parse(MatrixArguments, flags, PROG, DESCRIPTION), flags)


def test_the_paper_s_tables_are_sixteen_cells() -> None:
    assert [len(cells(tables)) for tables in ((2,), (3,), (4,), (2, 3), (2, 4), (2, 3, 4))] == [4, 4, 12, 8, 12, 16]
    assert cells((2,))[0].label == "pascal 1-shot resnet50 both"


def test_each_cell_has_its_own_and_the_job_s_flags_and_its_data_set_s_recipe() -> None:
    found = wanted("--recipe", "published", "--pascal-source", "/p", "--coco-source", "s3://c", "--folds", "0", "2")
    assert list(found) == cells((2, 3, 4))
    for cell, config in found.items():
        assert (config.dataset, config.shot) == (cell.dataset, cell.shot)
        assert (config.model.backbone, config.model.similarity) == (cell.backbone, cell.similarity)
        assert config.source == {"pascal": "/p", "coco": "s3://c"}[cell.dataset]
        assert (config.folds, config.validation.selection) == ((0, 2), "novel")
        assert config.training.global_batch == {"pascal": 11, "coco": 14}[cell.dataset], "as published"


def test_tables_can_be_narrowed_and_a_file_of_weights_named_by_backbone() -> None:
    found = wanted(
        *("--tables", "4", "--backbones", "resnet18", "resnet34", "--shots", "2", "--similarities", "cosine"),
        *("--source", "/data", "--backbone-weights", "/w/{backbone}.pth"),
    )
    assert [cell.label for cell in found] == ["pascal 2-shot resnet18 cosine", "pascal 2-shot resnet34 cosine"]
    assert [config.backbone_weights for config in found.values()] == ["/w/resnet18.pth", "/w/resnet34.pth"]
    assert {config.source for config in found.values()} == {"/data"}


def test_another_network_has_no_similarities_to_choose_from() -> None:
    found = wanted("--architecture", "panet", "--tables", "2", "4")
    assert [cell.label for cell in found] == [cell.label for cell in cells((2,))]
    assert {config.model.architecture for config in found.values()} == {"panet"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dataset", "coco"], "--dataset differs from cell to cell; give --tables or --datasets"),
        (["--shot=5"], "--shot differs from cell to cell; give --shots"),
        (["--source", "x"], "--source is one place for pascal and coco; give --pascal-source and --coco-source"),
        (["--tables", "5"], "tables must be of 2, 3, 4 and at least one, got (5,)"),
    ],
)
def test_flags_that_cannot_be_are_bad_usage(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main(flags) == 2
    assert capsys.readouterr().err == f"{PROG}: {told}\n"


def test_the_table_at_the_end_says_how_each_cell_ended() -> None:
    ended: list[dict[str, Any]] = [
        {"cell": "pascal 1-shot resnet50 both", "status": "was done", "mean_miou": 0.6475, "mean_fb_iou": 0.785},
        {"cell": "coco 1-shot resnet50 both", "status": "failed", "error": "coco: seal the store: full disk"},
    ]
    assert matrix.summary(ended).splitlines() == [
        "cell                         status    mIoU, %  FB-IoU, %",
        "pascal 1-shot resnet50 both  was done     64.8       78.5",
        "coco 1-shot resnet50 both    failed          –          –",
        "coco 1-shot resnet50 both: coco: seal the store: full disk",
    ]


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("was done", 0), ("failed", 1)])
def test_one_failed_cell_is_a_failure(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = [{"cell": "a", "status": "done"}, {"cell": "b", "status": status}]
    monkeypatch.setattr(matrix, "run", lambda wanted: ended)
    assert matrix.main(["--tables", "2", "--source", "/data"]) == code
    assert json.loads(capsys.readouterr().out) == {"cells": ended}


def test_a_source_that_is_not_there_stops_it_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = matrix.main(["--tables", "2", "--source", str(tmp_path / "none"), "--store", str(tmp_path / "store")])
    assert code == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
