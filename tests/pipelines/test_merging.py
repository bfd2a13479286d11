"""Several cross-validations as one graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import dag, storage
from pipelines.cells import Cell, cells
from pipelines.config import CrossValidationConfig
from pipelines.graph import Graph, build
from pipelines.merging import merge, upstream
from pipelines.scan import Scan
from pipelines.train import train_fold

SCAN = Scan(fingerprint="a" * 64, images=3, class_names=("disc",), mask_mode="class label map, 255 ignored")


def graphs(store: Path, tables: tuple[int, ...] = (2, 4), folds: tuple[int, ...] = (0, 1)) -> dict[Cell, Graph]:
    config = CrossValidationConfig(dataset="pascal", source="x", store=str(store), folds=folds)
    found = {}
    for cell in cells(tables):
        model = replace(config.model, backbone=cell.backbone, similarity=cell.similarity)  # type: ignore[arg-type]
        own = replace(config, dataset=cell.dataset, shot=cell.shot, model=model)  # type: ignore[arg-type]
        # Another data set is another source.
        scanned = replace(SCAN, fingerprint=cell.dataset.ljust(64, "0"))
        found[cell] = build(own, scanned, "imagenet", side_by_side=len(folds))
    return found


def test_what_cells_share_is_one_stage_with_what_they_have_in_common_in_its_name(tmp_path: Path) -> None:
    built = graphs(tmp_path)
    parts = merge(built, at_once=1)
    planned = dag.plan([part.reported for part in parts.values()])
    names = [stage.name for stage in planned.pending]
    assert len(names) == len(set(names))
    # 12 cells: a shard and the store once; both draws of a fold once a shot; 3 stages a fold and a report a cell.
    assert len(names) == 2 + 2 * 2 * 2 + 12 * (3 * 2 + 1)
    assert "pascal: seal the store" in names
    assert "pascal 1-shot: draw training episodes of fold 0" in names
    assert "pascal 5-shot resnet101 cosine: train fold 1" in names
    alone = {stage.result for graph in built.values() for stage in upstream(graph.reported)}
    assert {stage.result for stage in planned.pending} == alone, "nothing is left out, nothing is added"


def test_two_data_sets_share_nothing(tmp_path: Path) -> None:
    names = [name for part in merge(graphs(tmp_path, (2, 3)), at_once=1).values() for name in part.names]
    assert {name.split()[0].rstrip(":") for name in names} == {"pascal", "coco"}
    assert names.count("coco: seal the store") == 4, "one stage, in each of its four cells"


@pytest.mark.parametrize("at_once", [1, 3])
def test_folds_of_all_cells_take_turns_each_judged_before_another_takes_its_room(tmp_path: Path, at_once: int) -> None:
    parts = merge(graphs(tmp_path), at_once)
    planned = dag.plan([part.reported for part in parts.values()])
    trainings = {s.result: s for s in planned.pending if s.run is train_fold}
    assert len(trainings) == 24
    folds = [fold for graph in graphs(tmp_path).values() for fold in zip(graph.trained, graph.evaluated, strict=True)]
    for place, result in enumerate(trained.result for trained, _ in folds):
        expected = (folds[place - at_once][1].result,) if place >= at_once else ()
        assert tuple(earlier.result for earlier in trainings[result].after) == expected
    assert all(not stage.after for stage in planned.pending if stage.run is not train_fold)


def test_a_training_that_is_done_takes_no_turn(tmp_path: Path) -> None:
    built = graphs(tmp_path, tables=(2,))
    _, second, third, *_ = [stage for graph in built.values() for stage in graph.trained]
    judged = next(iter(built.values())).evaluated[0]
    for name in ("result.json", *second.parts):
        storage.write_bytes(storage.join(second.folder, name), b"{}")
    parts = merge(built, at_once=1)
    planned = dag.plan([part.reported for part in parts.values()])
    trainings = {s.result: s for s in planned.pending if s.run is train_fold}
    assert [earlier.result for earlier in trainings[third.result].after] == [judged.result]
    assert second.result not in trainings
