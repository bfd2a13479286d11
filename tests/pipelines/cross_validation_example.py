"""A finished cross-validation as the stages hand it over, with its pictures; numbers made up but fixed."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from mshnet.protocols import Protocol
from mshnet.visualize import (
    Shown,
    class_bars,
    energy_picture,
    episode_panel,
    foreground_iou,
    learning_curves,
    png_bytes,
)
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

CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv"),
]
PROTOCOL = Protocol(
    name="published",
    draw="published",
    episodes=1000,
    seeds=(0,),
    shot=1,
    resize="square",
    side_px=473,
    ignore="excluded",
    mask_mode="class label map, 255 ignored",
    split_lists="lists:4f2c1a9be07d",
    novel_removed=True,
    selection="best mIoU on 3 held-out base classes",
)
EPISODES = (
    *(("best", 2), ("best", 4), ("median", 22), ("median", 26)),
    *(("worst", 90), ("false foreground", 60), ("missed small object", 50)),
)
"""Rank, and by how many pixels the prediction misses."""
TRAINED = (0.402, 0.471, 0.386, 0.371)
BASELINE_MIOU = {"untrained": 0.121, "foreground": 0.186, "prototype": 0.226}


def score(names: list[str], miou: float, fb_iou: float) -> Score:
    """Class IoU spread evenly around the mean, intervals of 4 and 10 points, sizes 10 points apart."""
    offsets = np.linspace(0.08, -0.08, len(names))
    values = {name: round(miou + float(offset), 4) for name, offset in zip(names, offsets, strict=True)}
    return Score(
        miou=miou,
        fb_iou=fb_iou,
        class_iou=values,
        episodes=1000,
        miou_interval=around(miou, 0.02),
        fb_iou_interval=around(fb_iou, 0.01),
        class_interval={name: around(value, 0.05) for name, value in values.items()},
        by_size={
            "small": SizeScore(miou=miou - 0.1, episodes=200),
            "medium": SizeScore(miou=miou, episodes=500),
            "large": SizeScore(miou=miou + 0.1, episodes=300),
        },
        by_seed=(miou,),
    )


def around(value: float, half: float) -> Interval:
    return Interval(low=round(value - half, 4), high=round(value + half, 4))


def panel(fold: int, size: tuple[int, int], miss: int, class_name: str, note: str) -> tuple[Shown, bytes]:
    """An episode of discs on a gradient, as it is and drawn; the prediction misses the disc by `miss` pixels."""
    height, width = size
    y, x = np.mgrid[:height, :width]

    def disc(cx: float, cy: float, radius: float) -> np.ndarray:
        return np.asarray((x - cx) ** 2 + (y - cy) ** 2 < radius**2)

    def picture(mask: np.ndarray, hue: int) -> np.ndarray:
        ground = np.stack([x * 180 // width, y * 180 // height, np.full_like(x, 60 + 40 * fold)], axis=-1)
        return np.where(mask[..., None], (240, hue, 90), ground).astype(np.uint8)

    wanted = disc(width * 0.55, height * 0.5, height * 0.3)
    truth = wanted.astype(np.uint8)
    truth[disc(width * 0.55, height * 0.5, height * 0.33) & ~wanted] = 255
    found = disc(width * 0.55 + miss, height * 0.5, height * 0.3)
    support = disc(width * 0.35, height * 0.45, height * 0.25)
    iou = foreground_iou(truth, found)
    shown = Shown(
        query=picture(wanted, 200),
        truth=truth,
        prediction=found,
        supports=[(picture(support, 150), support)],
        class_name=class_name,
        iou=iou,
    )
    return shown, png_bytes(episode_panel(shown, note))


def energy(shown: Shown) -> bytes:
    """Energy maps that fall off from the true object's left edge, each block less sharply."""
    ramp = np.abs(np.arange(shown.truth.shape[1]) - np.nonzero(shown.truth == 1)[1].min())
    maps = {
        (level, name): np.exp(-ramp / (12 * level * width)) * np.ones((shown.truth.shape[0], 1))
        for level in (5, 4, 3)
        for width, name in ((1, "prototype"), (3, "cosine"))
    }
    return png_bytes(energy_picture(shown, maps))


def fold_result(fold: int, epochs: int) -> tuple[FoldResult, dict[str, bytes]]:
    names = CLASSES[5 * fold : 5 * fold + 5]
    trained = score(names, TRAINED[fold], 0.62 + 0.01 * fold)
    baselines = {key: score(names, BASELINE_MIOU[key] + 0.01 * fold, 0.4) for key in BASELINES}
    history = [
        EpochRecord(
            epoch=epoch,
            step=94 * epoch,
            loss=0.35 + 0.9 * math.exp(-epoch / 6) + 0.01 * fold,
            outer_loss=0.2 + 0.5 * math.exp(-epoch / 6),
            inner_loss=0.5 + 1.2 * math.exp(-epoch / 6),
            learning_rate=0.01 * 0.9 ** (epoch // 5),
            episodes_per_s=38.5,
            validation_miou=TRAINED[fold] * (1 - math.exp(-epoch / 5)) if epoch % 2 == 0 else None,
        )
        for epoch in range(1, epochs + 1)
    ]
    panels, pictures = [], {}
    for position, (rank, miss) in enumerate(EPISODES):
        class_name = names[position % len(names)]
        name = f"panel-{rank.replace(' ', '-')}-{position}.png"
        shown, pictures[f"fold{fold}/{name}"] = panel(fold, (150, 200), miss, class_name, f"{rank} of 1000")
        first = rank not in [earlier for earlier, _ in EPISODES[:position]]
        if first:
            pictures[f"fold{fold}/energy-{name}"] = energy(shown)
        panels.append(
            EpisodeOutcome(
                query=f"2007_00{fold}{position:03d}",
                supports=[f"2008_00{fold}{position:03d}"],
                class_name=class_name,
                iou=shown.iou,
                picture=name,
                rank=rank,
                energy=f"energy-{name}" if first else "",
                note="Object 17.0 %, false foreground 3.5 % of the picture",
            )
        )
    curve = [(record.epoch, record.loss, record.validation_miou) for record in history]
    pictures[f"fold{fold}/curve.png"] = learning_curves({f"fold {fold}": curve})
    series = {"trained": trained.class_iou} | {key: value.class_iou for key, value in baselines.items()}
    pictures[f"fold{fold}/bars.png"] = class_bars(series)
    result = FoldResult(
        fold=fold,
        novel_classes=names,
        score=trained,
        baselines=baselines,
        history=history,
        panels=panels,
        curve_picture="curve.png",
        bars_picture="bars.png",
        protocol=PROTOCOL,
        best_epoch=epochs - 2,
        train_episodes=750 * epochs,
        train_s=361.2 + fold,
        evaluate_s=48.9,
        run_id=f"{fold}5b0a5f4c9d14e0f8a7f2f6f5a9d3c1{fold}",
        model_version=str(fold + 1),
        checkpoint=f"s3://models/mshnet/pascal/fold{fold}/best",
        other_shots={"5": score(names, TRAINED[fold] + 0.05, 0.65)},
        outcomes=f"evaluations/pascal-fold{fold}/outcomes.arrow",
        outcomes_sha256=f"{fold}a" * 32,
        episodes_hash=f"{fold}b" * 6,
        features=FeatureUse(images=345, asked=2000, computed=400, from_memory=1500, from_disk=100),
    )
    return result, pictures


@cache
def cross_validation_example(epochs: int = 20) -> tuple[CrossValidation, dict[str, bytes]]:
    """The result and its pictures by name `fold{n}/file.png`."""
    folds, pictures = [], {}
    for fold in range(4):
        result, drawn = fold_result(fold, epochs)
        folds.append(result)
        pictures |= drawn
    return CrossValidation(
        name="pascal-resnet50-1shot",
        dataset="pascal",
        backbone="resnet50",
        similarity="both",
        shot=1,
        image_size_px=473,
        folds=folds,
        mean_miou=mean([fold.score.miou for fold in folds]),
        mean_fb_iou=mean([fold.score.fb_iou for fold in folds]),
        miou_interval=Interval(low=0.3975, high=0.4175),
        fb_iou_interval=Interval(low=0.63, high=0.64),
        parent_run_id="c0ffee5f4c9d14e0f8a7f2f6f5a9d3c1",
        config={"dataset": "pascal", "train": {"learning_rate": 0.01, "batch": 8}, "folds": [0, 1, 2, 3]},
        fingerprints={"source": "1f" * 32, "store": "2e" * 32},
        git_commit="0123456789abcdef0123456789abcdef01234567",
        versions={"python": "3.11.7", "torch": "2.15.0", "ray": "2.60.0", "mlflow": "3.17.2"},
        learnable_parameters=29_626_952,
        mask_mode=PROTOCOL.mask_mode,
        artifacts={"store": "s3://store/pascal-473", "tracking": "http://tracker:5000"},
    ), pictures
