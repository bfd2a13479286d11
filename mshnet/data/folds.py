"""Which classes each fold tests (novel) and trains on (base). Class ids are 0-based everywhere in code."""

from __future__ import annotations

import hashlib

from mshnet.errors import InputError

FOLDS = 4
DATASETS = ("pascal", "coco", "shapes")

_PASCAL = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# In ascending category id (1..90 with ten gaps), which is the order of the class ids 0..79.
_COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip


def class_names(dataset: str) -> tuple[str, ...]:
    """Names by class id: 20 for pascal and shapes, 80 for coco."""
    _check_dataset(dataset)
    if dataset == "shapes":
        from mshnet.data.shapes import class_names as generated_names

        return generated_names("voc")
    return _COCO if dataset == "coco" else _PASCAL


def novel_classes(dataset: str, fold: int) -> tuple[int, ...]:
    """Classes that the fold tests: 5f..5f+4 for pascal and shapes; f, f+4, ..., f+76 for coco."""
    _check_dataset(dataset)
    check_fold(fold)
    if dataset == "coco":
        return tuple(range(fold, 80, FOLDS))
    return tuple(range(5 * fold, 5 * fold + 5))


def base_classes(dataset: str, fold: int) -> tuple[int, ...]:
    """Classes that the fold trains on: all but the novel ones, ascending."""
    novel = set(novel_classes(dataset, fold))
    return tuple(c for c in range(80 if dataset == "coco" else 20) if c not in novel)


def held_out_base_classes(dataset: str, fold: int, count: int, seed: int) -> tuple[int, ...]:
    """Base classes to keep out of training for choosing the best checkpoint: `count` of them, ascending.

    Ordered by a hash of (dataset, fold, seed, class), so that no library's generator decides the choice.
    """
    base = base_classes(dataset, fold)
    if not 0 <= count < len(base):
        raise InputError(f"held-out base classes must be 0..{len(base) - 1} of {len(base)}, got {count}")
    drawn = sorted(base, key=lambda c: hashlib.sha256(f"{dataset}/{fold}/{seed}/{c}".encode()).digest())
    return tuple(sorted(drawn[:count]))


def check_fold(fold: int) -> None:
    """InputError unless the fold is 0..3."""
    if not 0 <= fold < FOLDS:
        raise InputError(f"fold must be 0..{FOLDS - 1}, got {fold}")


def _check_dataset(dataset: str) -> None:
    if dataset not in DATASETS:
        raise InputError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
