"""Weights that are given instead of trained: what is taken over, what is refused before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mshnet import ModelConfig, MSHNet
from mshnet.checkpoint import WEIGHTS_FILE, save_model
from mshnet.errors import InputError
from pipelines import given, matrix, report_markdown, run_metrics, scan, search, storage
from pipelines.config import CrossValidationConfig
from pipelines.fold_table import facts, table_rows
from pipelines.graph import build
from pipelines.results import GIVEN
from pipelines.train import TrainedFold
from tests.pipelines.cross_validation_example import cross_validation_example
from tests.pipelines.drawn_fold import done, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 49 px."""
    folder = tmp_path_factory.mktemp("given") / "model"
    torch.manual_seed(0)
    model = MSHNet(ModelConfig(backbone="resnet18", similarity="cosine"))
    save_model(model, str(folder), {"image_size_px": 49, "fold": 0, "config": {"dataset": "shapes"}})
    return folder


def config_of(root: Path, *folders: Path, folds: tuple[int, ...] = (0,)) -> CrossValidationConfig:
    return replace(small_config(root), folds=folds, trained=tuple(map(str, folders)))


def changed(folder: Path, to: Path, **values: object) -> Path:
    """The same model with other details."""
    to.mkdir(parents=True)
    (to / WEIGHTS_FILE).symlink_to(folder / WEIGHTS_FILE)
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **values}))
    return to


def test_network_and_image_size_are_the_folders(folder: Path, tmp_path: Path) -> None:
    config = given.resolved(config_of(tmp_path, folder))
    assert config.model == ModelConfig(backbone="resnet18", similarity="cosine")
    assert config.images.image_size_px == 49
    assert config.selection == "given"
    assert config.model_name == "mshnet-shapes-resnet18-cosine-given-1shot"
    assert given.resolved(small_config(tmp_path)) == small_config(tmp_path)


def test_the_stage_takes_a_copy_that_later_changes_do_not_reach(folder: Path, tmp_path: Path) -> None:
    config = given.resolved(config_of(tmp_path, folder))
    stage = given.stage(config, 0)
    taken = TrainedFold.from_json(done(stage))
    copy = Path(config.store, taken.model)
    assert (copy / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
    assert (taken.history, taken.train_episodes) == ([], 0)
    assert given._sha256(str(folder))[:12] in taken.git_commit
    assert given.stage(config, 0).recorded() is not None
    assert given.stage(replace(config, precision="bfloat16"), 0).recorded() is None  # gives other numbers
    (copy / WEIGHTS_FILE).unlink()
    assert stage.recorded() is None


def test_the_graph_trains_nothing_and_differs_from_that_of_a_training(folder: Path, tmp_path: Path) -> None:
    config = given.resolved(config_of(tmp_path, folder, folds=(0, 2)))
    graph = build(config, scan.UNKNOWN, "given")
    assert [stage.name for stage in graph.trained] == [f"take over the weights of fold {fold}" for fold in (0, 2)]
    trained = build(replace(config, trained=()), scan.UNKNOWN, "given")
    assert not {stage.result for stage in graph.evaluated} & {stage.result for stage in trained.evaluated}
    assert not {stage.result for stage in graph.drawn_test} & {stage.result for stage in trained.drawn_test}


def test_one_folder_for_each_fold_or_one_for_all(folder: Path, tmp_path: Path) -> None:
    two = config_of(tmp_path, folder, tmp_path, folds=(3, 1))
    assert [two.given_model(fold) for fold in (3, 1)] == [str(folder), str(tmp_path)]
    assert config_of(tmp_path, folder, folds=(3, 1)).given_model(1) == str(folder)
    with pytest.raises(InputError, match="one for each of 3 folds, got 2"):
        config_of(tmp_path, folder, folder, folds=(0, 1, 2))


def test_another_folds_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """They were trained on the classes that would be tested."""
    given.check(given.resolved(config_of(tmp_path, folder, folds=(0,))))
    with pytest.raises(InputError, match=r"never saw the classes of fold 1, found .* those of fold 0 of shapes"):
        given.check(given.resolved(config_of(tmp_path, folder, folds=(1,))))
    elsewhere = changed(folder, tmp_path / "coco", config={"dataset": "coco"})
    given.check(given.resolved(config_of(tmp_path, elsewhere, folds=(1,))))  # other classes altogether


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model under"):
        given.resolved(config_of(tmp_path, tmp_path / "absent"))
    other_size = changed(folder, tmp_path / "other_size", image_size_px=33)
    with pytest.raises(InputError, match=r"cosine at 49 px in .* and resnet18 cosine at 33 px in"):
        given.resolved(config_of(tmp_path, folder, other_size, folds=(0, 2)))
    with pytest.raises(InputError, match="expected image_size_px"):
        given.resolved(config_of(tmp_path, changed(folder, tmp_path / "no_size", image_size_px=None)))
    damaged = changed(folder, tmp_path / "damaged")
    (damaged / WEIGHTS_FILE).unlink()
    storage.write_bytes(str(damaged / WEIGHTS_FILE), (folder / WEIGHTS_FILE).read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read safely"):
        given.check(given.resolved(config_of(tmp_path, damaged)))


def test_every_number_says_that_its_weights_were_given() -> None:
    result, pictures = cross_validation_example(epochs=2)
    protocol = replace(result.folds[0].protocol, selection=f"{GIVEN} (training unknown)")
    folds = [replace(fold, protocol=protocol, history=[]) for fold in result.folds]
    result = replace(result, folds=folds)
    assert table_rows(result)[0].label == "MSHNet, given weights"
    assert {fact.name: fact.here for fact in facts(result)}["training images with a novel class"] == "not known"
    assert not [name for name in run_metrics.of_cross_validation(result, None) if name in ("mean/miou", "fold0/miou")]
    assert run_metrics.of_fold(folds[0], None)["test_given_weights/miou"] == pytest.approx(folds[0].score.miou)
    text = "\n".join(report_markdown.markdown(result, pictures))
    assert "given weights (training unknown), " in text
    assert "training episodes in" not in text
    assert "Learning curves" not in text


def test_a_search_takes_no_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave --trained out"):
        search.check(config_of(tmp_path, folder), search.SearchConfig())


def test_the_tables_cells_take_none_as_each_is_another_network() -> None:
    argv = ["--trained", "model", "--tables", "2"]
    with pytest.raises(InputError, match="--trained is of one cell"):
        matrix.configurations(matrix.parse(matrix.MatrixArguments, argv, "matrix", ""), argv)
