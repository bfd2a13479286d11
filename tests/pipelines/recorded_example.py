"""A cross-validation's hand-made results on a store, and recorded in a tracker as its stages do it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mshnet import checkpoint
from mshnet.protocols import Protocol
from pipelines import provenance, recipes
from pipelines.aggregate import record
from pipelines.config import CrossValidationConfig, ValidationConfig
from pipelines.drawn import DrawnTest, DrawnTraining, TestList
from pipelines.register import register_fold
from pipelines.results import (
    BASELINES,
    CrossValidation,
    EpisodeOutcome,
    EpochRecord,
    FeatureUse,
    FoldResult,
    Interval,
    Score,
    SizeScore,
    mean,
)
from pipelines.scan import Scan
from pipelines.tracking import Tracker
from pipelines.train import TrainedFold
from tests.pipelines.cross_validation_example import BASELINE_MIOU, CLASSES, PROTOCOL

DATA = "d1" * 32
SCAN = Scan(fingerprint=DATA, images=3, class_names=("disc",), mask_mode="class label map, 255 ignored")
MIOU = (0.652, 0.704, 0.611, 0.598)
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)


def protocol(config: CrossValidationConfig, **changes: Any) -> Protocol:
    """The published one, of a configuration."""
    standard = dataclasses.replace(
        PROTOCOL,
        shot=config.shot,
        side_px=config.images.image_size_px,
        selection="best epoch on held-out base classes (car, cat)",
    )
    return dataclasses.replace(standard, **changes)


def configuration(folder: Path, tracking_uri: str, **changes: Any) -> CrossValidationConfig:
    """Of the paper's setting on Pascal-5i, with a store and tracker of one's own."""
    config = dataclasses.replace(recipes.paper(), validation=ValidationConfig(selection="base"))
    places = {"store": str(folder / "store"), "source": str(folder / "VOC2012"), "tracking_uri": tracking_uri}
    return dataclasses.replace(config, **(places | changes))


def score(names: Sequence[str], miou: float, fb_iou: float) -> Score:
    """Class IoU spread evenly around the mean."""
    offsets = np.linspace(0.08, -0.08, len(names))
    values = {name: round(miou + float(offset), 4) for name, offset in zip(names, offsets, strict=True)}
    return Score(
        miou=miou,
        fb_iou=fb_iou,
        class_iou=values,
        episodes=1000,
        miou_interval=Interval(low=miou - 0.014, high=miou + 0.013),
        fb_iou_interval=Interval(low=fb_iou - 0.009, high=fb_iou + 0.009),
        class_interval={name: Interval(low=value - 0.03, high=value + 0.03) for name, value in values.items()},
        by_size={
            "small": SizeScore(miou=miou - 0.2, episodes=210),
            "medium": SizeScore(miou=miou - 0.02, episodes=430),
            "large": SizeScore(miou=miou + 0.08, episodes=360),
        },
    )


def fold_result(config: CrossValidationConfig, fold: int, miou: float, **changes: Any) -> FoldResult:
    """As the evaluation leaves it."""
    names = CLASSES[5 * fold : 5 * fold + 5]
    ranks = ("best", "median", "worst", "false foreground", "missed small object")
    panels = [
        EpisodeOutcome(
            query=f"2007_{fold}{position}",
            supports=[f"2008_{fold}{position}"],
            class_name=names[position],
            iou=0.9 - 0.2 * position,
            picture=f"{rank.replace(' ', '-')}-{position}.png",
            rank=rank,
            energy="energy-0.png" if rank == "best" else "",
        )
        for position, rank in enumerate(ranks)
    ]
    return FoldResult(
        fold=fold,
        novel_classes=names,
        score=score(names, miou, 0.77 + 0.01 * fold),
        baselines={name: score(names, BASELINE_MIOU[name] + 0.01 * fold, 0.45) for name in BASELINES},
        history=[epoch(number, miou) for number in range(1, 13)],
        panels=panels,
        curve_picture="curves.png",
        bars_picture="classes.png",
        protocol=changes.pop("protocol", protocol(config)),
        best_epoch=9,
        train_episodes=135_000,
        train_s=5400.0,
        evaluate_s=61.5,
        run_id="",
        model_version=None,
        checkpoint=f"folds/fold{fold}/model",
        git_commit="0123456789abcdef0123456789abcdef01234567",
        other_shots={"5": score(names, miou + 0.04, 0.8)},
        outcomes=f"evaluations/fold{fold}/outcomes.arrow",
        features=FeatureUse(images=1449, asked=2000, computed=500, from_memory=1500, from_disk=0),
        **changes,
    )


def epoch(number: int, miou: float) -> EpochRecord:
    """A point of a curve that comes near `miou`."""
    return EpochRecord(
        epoch=number,
        step=940 * number,
        loss=0.4 + 0.9 * 0.7**number,
        outer_loss=0.2 + 0.5 * 0.7**number,
        inner_loss=0.5 + 1.2 * 0.7**number,
        learning_rate=0.01,
        episodes_per_s=38.5,
        validation_miou=miou * (1 - 0.6**number),
    )


def record_fold(config: CrossValidationConfig, run_id: str, result: FoldResult) -> FoldResult:
    """What the stage "register fold" makes of a result; pictures and weights are stand-ins."""
    fold, store = result.fold, Path(config.store)
    pictures = store / "evaluations" / f"fold{fold}"
    model = store / result.checkpoint
    for folder in (pictures, model):
        folder.mkdir(parents=True, exist_ok=True)
    shown = [result.curve_picture, result.bars_picture, *(panel.picture for panel in result.panels)]
    for name in (*shown, *(panel.energy for panel in result.panels if panel.energy)):
        (pictures / name).write_bytes(PIXEL)
    (pictures / "outcomes.arrow").write_bytes(b"counts")
    (model / checkpoint.WEIGHTS_FILE).write_bytes(f"{config.model.label} {fold} {result.score.miou}".encode())
    described = {"format": checkpoint.FORMAT_VERSION, "model": {"backbone": "resnet18"}, "image_size_px": 65}
    (model / checkpoint.CONFIG_FILE).write_text(json.dumps(described))
    drawn = {"fold": fold, "folder": "episodes/a", "store": "images/b", "left_out": ()}
    training = DrawnTraining(
        **drawn, split_lists=result.protocol.split_lists, selection=result.selection, base_classes=(5, 6),
        training_pairs=4760, removed_pairs=1200, pairs_sha256="a" * 64, validation_sha256="b" * 64,
    )  # fmt: skip
    episodes_hash = f"{fold}e68ad4a7d8d"
    listed = TestList(shot=config.shot, seed=0, split="test", episodes_hash=episodes_hash)
    test = DrawnTest(
        **drawn, protocol=result.protocol, tests=[listed], novel_classes=(0, 1), test_pairs=346,
        episodes_hash=episodes_hash, episodes_sha256="c" * 64,
    )  # fmt: skip
    trained = TrainedFold(
        fold=fold, model=result.checkpoint, history=result.history, best_epoch=result.best_epoch,
        train_episodes=result.train_episodes, train_s=result.train_s, run_id=run_id, git_commit=result.git_commit,
    )  # fmt: skip
    stages = (training, test, trained, result)
    return FoldResult.from_json(
        register_fold(config, DATA, run_id, str(pictures), *(stage.to_json() for stage in stages))
    )


def record_job(config: CrossValidationConfig, key: str, miou: Sequence[float] = MIOU) -> CrossValidation:
    """A whole job's runs: the folds' and the parent's."""
    tracker = Tracker(config.tracking_uri, config.experiment)
    tags = provenance.tags(config, SCAN, "imagenet")
    name = f"{config.dataset} {config.shot}-shot {config.model.backbone} {config.model.similarity}"
    parent = tracker.start_parent(name, config.to_json(), tags, key)
    folds = []
    for fold, value in enumerate(miou):
        params, own = {**config.to_json(), "fold": fold}, {**tags, "fold": str(fold)}
        run_id = tracker.start_child(parent, f"fold {fold}", params, own, f"{key}-{fold}")
        folds.append(record_fold(config, run_id, fold_result(config, fold, value)))
    mean_miou, mean_fb_iou = mean(list(miou)), mean([fold.score.fb_iou for fold in folds])
    result = CrossValidation(
        name=name,
        dataset=config.dataset,
        backbone=config.model.backbone,
        similarity=config.model.similarity,
        shot=config.shot,
        image_size_px=config.images.image_size_px,
        folds=folds,
        mean_miou=mean_miou,
        mean_fb_iou=mean_fb_iou,
        parent_run_id=parent,
        config=config.to_json(),
        fingerprints={"data": DATA, "backbone_weights": "imagenet"},
        git_commit="0123456789abcdef0123456789abcdef01234567",
        versions=provenance.versions(),
        learnable_parameters=29_626_952,
        mask_mode=SCAN.mask_mode,
        architecture=config.model.architecture,
        miou_interval=Interval(low=mean_miou - 0.008, high=mean_miou + 0.008),
        fb_iou_interval=Interval(low=mean_fb_iou - 0.005, high=mean_fb_iou + 0.005),
    )
    tracker.log_bytes(parent, b"<h1>report</h1>", "report/report.html")
    record(tracker, config, result)
    tracker.finish(parent)
    return result
