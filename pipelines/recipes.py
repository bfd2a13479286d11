"""Named configurations. A variant is `dataclasses.replace` of one of these."""

from __future__ import annotations

from dataclasses import replace

from mshnet.config import (
    PUBLISHED_INNER_WEIGHT,
    ImageFormat,
    ModelConfig,
    TrainingConfig,
    paper_training,
    published_training,
)
from mshnet.data.folds import OWN_DATASETS
from mshnet.errors import InputError
from pipelines.config import CrossValidationConfig, EvaluationConfig, ValidationConfig


def named(recipe: str, dataset: str) -> CrossValidationConfig:
    """The configuration of a recipe for a data set ("" for the recipe's own). Raises InputError for no such name."""
    recipes = {"default": default, "paper": paper, "published": published, "quick": quick, "demo": demo}
    if recipe not in recipes:
        raise InputError(f"recipe must be one of {', '.join(recipes)}, got {recipe!r}")
    return recipes[recipe](dataset)


def default(dataset: str = "") -> CrossValidationConfig:
    """The paper's training with the checkpoint chosen on held-out base classes; generated data runs the demo."""
    return demo() if dataset in ("", "shapes") else _on(dataset, paper_training())


def paper(dataset: str = "") -> CrossValidationConfig:
    """The paper's text: SGD 0.01, weight decay 0.0005, batch 8, inner weight 1/3, best epoch on the test episodes."""
    return _as_published(_on(dataset or "pascal", paper_training()))


def published(dataset: str = "") -> CrossValidationConfig:
    """The published code: SGD 0.025, weight decay 0.00005, batch 11 or 14, inner weight 0.3, likewise chosen."""
    dataset = dataset or "pascal"
    return _as_published(_on(dataset, published_training(dataset)))


def quick(dataset: str = "") -> CrossValidationConfig:
    """Without a cluster: 6,400 episodes a fold at 193 px, for one GPU or a laptop's evening.

    Of about 2.5 hours of one core a fold, by the 4 episodes/s at 113 px of docs/benchmarks/real_images.md.
    """
    dataset = dataset or "pascal"
    training = TrainingConfig(epochs=16, episodes_per_epoch=400, global_batch=8, learning_rate=0.01, schedule="cosine")
    config = _on(dataset, training)
    return replace(
        config,
        images=ImageFormat(image_size_px=193),
        training=training,
        validation=replace(config.validation, validation_episodes=100),
        evaluation=replace(config.evaluation, protocol="balanced", evaluation_episodes=400),
    )


def demo(dataset: str = "") -> CrossValidationConfig:
    """A laptop's five minutes: generated pictures, a small backbone with random weights, small images."""
    return CrossValidationConfig(
        dataset="shapes",
        images=ImageFormat(image_size_px=65),
        min_object_px=256,
        # Two minutes are few updates: small batches make more of them, and dropout would only slow them down.
        model=ModelConfig(backbone="resnet18", dropout=0.0),
        backbone_weights="random",
        training=TrainingConfig(
            epochs=2,
            episodes_per_epoch=240,
            global_batch=4,
            learning_rate=0.01,
            schedule="cosine",
            inner_weight=PUBLISHED_INNER_WEIGHT,
        ),
        # With 15 base classes, every one is wanted for training; nothing is chosen, so nothing leaks.
        validation=ValidationConfig(selection="last"),
        evaluation=EvaluationConfig(protocol="balanced", evaluation_episodes=100, threshold_episodes=40),
    )


def _as_published(config: CrossValidationConfig) -> CrossValidationConfig:
    return replace(config, validation=replace(config.validation, selection="novel"))


def _on(dataset: str, training: TrainingConfig) -> CrossValidationConfig:
    source = {"pascal": "data/VOC2012", "coco": "data/COCO2014"}.get(dataset, "outputs/shapes")
    if dataset == "coco":
        training = replace(training, episodes_per_epoch=7500)
    if dataset in OWN_DATASETS:
        return CrossValidationConfig(
            dataset=dataset,  # type: ignore[arg-type]
            source="",
            training=training,
            # Of how many classes is not known here.
            validation=ValidationConfig(held_out_classes=0),
            evaluation=EvaluationConfig(protocol="balanced"),
        )
    return CrossValidationConfig(
        dataset=dataset,  # type: ignore[arg-type]  # checked on construction
        source=source,
        training=training,
        validation=ValidationConfig(held_out_classes=12 if dataset == "coco" else 3),
    )
