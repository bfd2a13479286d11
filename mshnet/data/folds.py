"""Which classes each fold tests (novel) and trains on (base). Class ids are 0-based everywhere in code."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mshnet.errors import InputError

FOLDS = 4
"""Of the field's data sets."""
DATASETS = ("pascal", "coco", "shapes")
"""Those whose classes and folds are fixed."""
OWN_DATASETS = ("coco-json", "voc", "fss")
"""Layouts of one's own data: any classes, folds by rule or by file."""

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


@dataclass(frozen=True)
class Partition:
    """Which classes each fold tests. What no fold tests and is not idle, every fold trains on."""

    novel: tuple[tuple[int, ...], ...]
    """By fold, ascending."""
    names: tuple[str, ...]
    """By class id."""
    origin: str
    """Where it is from, in words: recorded beside every number of one's own data."""
    idle: tuple[int, ...] = ()
    """Classes that take no part, as no image shows them."""
    key: str = "own"
    """Enters the choice of the classes that are held out; of the field's data sets their name."""

    @property
    def folds(self) -> int:
        """How many there are."""
        return len(self.novel)

    def tested(self, fold: int) -> tuple[int, ...]:
        """The classes that a fold tests, ascending; InputError where there is no such fold."""
        check_fold(fold, self.folds)
        return self.novel[fold]

    def base(self, fold: int) -> tuple[int, ...]:
        """The classes that a fold trains on: all but its novel ones and the idle, ascending."""
        out = {*self.tested(fold), *self.idle}
        return tuple(c for c in range(len(self.names)) if c not in out)

    def held_out(self, fold: int, count: int, seed: int) -> tuple[int, ...]:
        """Base classes to keep out of training for choosing the best checkpoint: `count` of them, ascending.

        With a count of 0 a fifth of them, at least one. Ordered by a hash of (key, fold, seed, class), so that no
        library's generator decides the choice.
        """
        base = self.base(fold)
        most = max(len(base) - 1, 0)
        wanted = count or max(1, round(len(base) / 5))
        if not 0 <= wanted <= most:
            raise InputError(
                f"held-out base classes must be 0..{most} of {len(base)}, got {wanted}; "
                "with too few classes to hold any out, keep the last epoch (--selection last)"
            )
        drawn = sorted(base, key=lambda c: _digest(f"{self.key}/{fold}/{seed}/{c}"))
        return tuple(sorted(drawn[:wanted]))


def published_partition(dataset: str) -> Partition:
    """The field's: fold f tests 5f..5f+4 of pascal and shapes; f, f+4, ..., f+76 of coco."""
    names = class_names(dataset)
    if dataset == "coco":
        novel = tuple(tuple(range(fold, 80, FOLDS)) for fold in range(FOLDS))
    else:
        novel = tuple(tuple(range(5 * fold, 5 * fold + 5)) for fold in range(FOLDS))
    return Partition(novel=novel, names=names, origin="published", key=dataset)


def stratified_partition(names: Sequence[str], images_per_class: Sequence[int], folds: int, seed: int) -> Partition:
    """Folds of alike classes, by rule: the frequent ones and the rare ones are spread over all folds.

    Classes in order of falling frequency are dealt out, one to each fold in turn; the order of the folds is drawn
    anew for each deal, and so is that of classes with equally many images, both from a hash of the seed and the
    names. So the folds' numbers of classes differ by one at most, and neither the order nor the ids of the classes
    matter. Classes without an image are idle.

    Args:
        names: By class id, all different.
        images_per_class: By class id, how many images show it.
        folds: 2 or more, and no more than there are classes with an image.
        seed: Of the draws.
    """
    _check_names(names)
    idle = tuple(c for c, count in enumerate(images_per_class) if count < 1)
    known = [c for c in range(len(names)) if c not in idle]
    if not 2 <= folds <= len(known):
        raise InputError(
            f"expected 2 folds or more and a class for each, found {folds} folds and {len(known)} classes with an "
            "image; change --fold-count, or give the folds in the file of --classes"
        )
    ordered = sorted(known, key=lambda c: (-images_per_class[c], _digest(f"class/{seed}/{names[c]}")))
    novel: list[list[int]] = [[] for _ in range(folds)]
    for start in range(0, len(ordered), folds):
        dealt = ordered[start : start + folds]
        order = sorted(range(folds), key=lambda fold: _digest(f"deal/{seed}/{names[dealt[0]]}/{fold}"))
        for class_id, fold in zip(dealt, order, strict=False):  # the last deal may be short
            novel[fold].append(class_id)
    return Partition(
        novel=tuple(tuple(sorted(classes)) for classes in novel),
        names=tuple(names),
        origin=f"{folds} folds by frequency, seed {seed}",
        idle=idle,
    )


def given_partition(
    names: Sequence[str], folds: Sequence[Sequence[str]], images_per_class: Sequence[int] = ()
) -> Partition:
    """Folds as given by names. A class in none of them is trained on in every fold, and tested in none.

    InputError for a name that the data has not, that stands in two folds, for a fold without classes, and for one
    that leaves nothing to train on. Classes without an image (where `images_per_class` is given) are idle.
    """
    _check_names(names)
    ids = {name: class_id for class_id, name in enumerate(names)}
    listed = [name for fold in folds for name in fold]
    unknown = [name for name in listed if name not in ids]
    twice = [name for name, count in Counter(listed).items() if count > 1]
    if unknown or twice:
        wrong = f"{_shown(unknown)} that the data has not" if unknown else f"{_shown(twice)} more than once"
        raise InputError(f"expected each class of the given folds once and by its name, found {wrong}")
    idle = tuple(c for c, count in enumerate(images_per_class) if count < 1)
    novel = tuple(tuple(sorted(ids[name] for name in fold if ids[name] not in idle)) for fold in folds)
    digest = hashlib.sha256("\n".join("\t".join(sorted(fold)) for fold in folds).encode()).hexdigest()[:12]
    found = Partition(novel=novel, names=tuple(names), origin=f"{len(novel)} folds given, {digest}", idle=idle)
    for fold, classes in enumerate(novel):
        if not classes or not found.base(fold):
            what = "no class with an image to test" if not classes else "none left to train on"
            raise InputError(
                f"expected classes to test and others to train on in each given fold, fold {fold} has {what}"
            )
    if not novel:
        raise InputError("expected a fold or more, found none given")
    return found


def class_names(dataset: str) -> tuple[str, ...]:
    """Names by class id: 20 for pascal and shapes, 80 for coco."""
    _check_dataset(dataset)
    if dataset == "shapes":
        from mshnet.data.shapes import class_names as generated_names

        return generated_names("voc")
    return _COCO if dataset == "coco" else _PASCAL


def novel_classes(dataset: str, fold: int) -> tuple[int, ...]:
    """Classes that a fold of the field's tests."""
    return published_partition(dataset).tested(fold)


def base_classes(dataset: str, fold: int) -> tuple[int, ...]:
    """Classes that a fold of the field's trains on."""
    return published_partition(dataset).base(fold)


def check_fold(fold: int, folds: int = FOLDS) -> None:
    """InputError unless the fold is 0..folds - 1."""
    if not 0 <= fold < folds:
        raise InputError(f"fold must be 0..{folds - 1}, got {fold}")


def _check_names(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"expected classes of different names, found {_shown(twice)} more than once; rename or merge")


def _shown(names: Sequence[str]) -> str:
    more = len(names) - 5
    return ", ".join(repr(name) for name in names[:5]) + (f" and {more} more" if more > 0 else "")


def _check_dataset(dataset: str) -> None:
    if dataset not in DATASETS:
        raise InputError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
