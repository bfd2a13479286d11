"""The recipes' numbers against the table of the paper's text and of the published code."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mshnet.errors import InputError
from mshnet.protocols import Episodes
from pipelines import recipes
from tests.conftest import needs_shared


def test_the_papers_text() -> None:
    config = recipes.paper()
    training = config.training
    assert (training.learning_rate, training.weight_decay, training.momentum) == (0.01, 0.0005, 0.9)
    assert (training.global_batch, training.episodes_per_epoch) == (8, 750 * 15)
    assert training.inner_weight == pytest.approx(1 / 3, abs=0)
    assert training.schedule == "exponential"
    # As fast as x0.9 every 5 epochs.
    assert training.learning_rate_at(5 * training.steps_per_epoch) == pytest.approx(0.009)
    assert (config.dataset, config.source) == ("pascal", "data/VOC2012")
    assert (config.images.image_size_px, config.model.backbone, config.model.similarity) == (473, "resnet50", "both")
    assert (config.validation.selection, config.evaluation.protocol) == ("novel", "published")
    assert config.evaluation.episodes == Episodes("published", 1000, (0,))
    assert (config.evaluation.resize, config.evaluation.ignored) == ("square", "excluded")
    assert config.removes_novel


@pytest.mark.parametrize(("dataset", "batch", "episodes"), [("pascal", 11, 11250), ("coco", 14, 7500)])
def test_the_published_code(dataset: str, batch: int, episodes: int) -> None:
    config = recipes.published(dataset)
    training = config.training
    assert (training.learning_rate, training.weight_decay, training.momentum) == (0.025, 0.00005, 0.9)
    assert (training.global_batch, training.episodes_per_epoch, training.epochs) == (batch, episodes, 300)
    assert training.inner_weight == 0.3
    rates = [training.learning_rate_at(epoch * training.steps_per_epoch) for epoch in (0, 4, 5, 9, 10)]
    assert rates == pytest.approx([0.025, 0.025, 0.0225, 0.0225, 0.02025])
    assert (config.validation.selection, config.evaluation.protocol) == ("novel", "published")
    assert config.evaluation == recipes.paper(dataset).evaluation
    assert config.removes_novel == (dataset == "pascal")


@needs_shared
def test_the_numbers_are_the_reference_tables(shared: Path) -> None:
    text = (shared / "reference" / "README.md").read_text().split("## Training recipe")[1]
    rows = {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
        if len(cells) == 3
    }
    paper, pascal, coco = recipes.paper().training, recipes.published("pascal").training, recipes.published("coco")
    momentum = re.search(r"momentum ([\d.]+)", next(name for name in rows if "momentum" in name))
    assert momentum is not None
    assert paper.momentum == pascal.momentum == float(momentum[1])
    rate = next(cells for name, cells in rows.items() if "learning rate" in name)
    assert [paper.learning_rate, pascal.learning_rate] == [float(cell) for cell in rate]
    assert [paper.weight_decay, pascal.weight_decay] == [float(cell) for cell in rows["weight decay"]]
    batches = [int(number) for cell in rows["batch"] for number in re.findall(r"\d+", cell)]
    assert [paper.global_batch, pascal.global_batch, coco.training.global_batch] == batches
    factor, every = re.findall(r"[\d.]+", rows["decay"][1])
    assert (pascal.decay, pascal.decay_epochs) == (float(factor), int(every))
    assert [str(pascal.epochs)] == re.findall(r"\d+", rows["epochs"][1])
    per_class = int(re.findall(r"\d+", rows["epoch, Pascal"][0])[0])
    assert paper.episodes_per_epoch == pascal.episodes_per_epoch == 15 * per_class
    of_coco = int(re.findall(r"\d,\d+", rows["epoch, COCO"][1])[0].replace(",", ""))
    assert coco.training.episodes_per_epoch == recipes.paper("coco").training.episodes_per_epoch == of_coco


def test_the_demo_is_small_and_chooses_nothing() -> None:
    config = recipes.demo()
    assert (config.dataset, config.images.image_size_px, config.model.backbone) == ("shapes", 65, "resnet18")
    assert config.backbone_weights == "random"
    assert (config.training.epochs, config.training.episodes_per_epoch, config.training.global_batch) == (2, 240, 4)
    assert config.validation.selection == "last"
    assert config.evaluation.episodes == Episodes("balanced", 100, (0,))
    last = config.training.epochs * config.training.steps_per_epoch - 1
    assert config.training.learning_rate_at(0) == 0.01
    assert 0 < config.training.learning_rate_at(last) < 1e-5


def test_the_default_is_the_papers_training_chosen_without_the_test_episodes() -> None:
    assert recipes.default() == recipes.default("shapes") == recipes.demo()
    for dataset, held_out in (("pascal", 3), ("coco", 12)):
        default, paper = recipes.default(dataset), recipes.paper(dataset)
        assert default.training == paper.training
        assert (default.validation.selection, default.validation.held_out_classes) == ("base", held_out)
        assert replace(default, validation=paper.validation) == paper


@pytest.mark.parametrize("recipe", ["default", "paper", "published", "quick"])
@pytest.mark.parametrize("dataset", ["coco-json", "voc", "fss"])
def test_own_data_is_judged_on_balanced_episodes_of_classes_that_nobody_counted_before(
    recipe: str, dataset: str
) -> None:
    config = recipes.named(recipe, dataset)
    assert (config.dataset, config.source, config.evaluation.protocol) == (dataset, "", "balanced")
    assert config.validation.held_out_classes == 0
    assert config.removes_novel


def test_quick_needs_no_cluster() -> None:
    config, paper = recipes.quick("pascal"), recipes.paper("pascal")
    episodes = [c.training.epochs * c.training.episodes_per_epoch for c in (config, paper)]
    assert episodes[0] * 500 < episodes[1]
    assert 4 * config.images.image_size_px**2 < paper.images.image_size_px**2
    assert config.validation.selection == "base"
    assert config.training.learning_rate_at(episodes[0] // config.training.global_batch - 1) < 1e-5


def test_names() -> None:
    assert recipes.named("published", "coco") == recipes.published("coco")
    assert recipes.named("paper", "") == recipes.paper("pascal")
    with pytest.raises(InputError, match="recipe must be one of default, paper, published, quick, demo, got 'slow'"):
        recipes.named("slow", "")
    with pytest.raises(InputError, match=r"dataset must be one of pascal, coco, .*, fss, got 'imagenet'"):
        recipes.named("paper", "imagenet")
