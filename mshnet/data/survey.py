"""What a labelled data set holds, before anything is trained on it: classes, sizes, folds, problems.

Pure: `survey` counts what `survey_walk` found in a source, or what the store's labels say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from mshnet.data.folds import Partition
from mshnet.data.splits import Pair, SplitLists
from mshnet.errors import InputError

SPREAD = (10, 50, 90)
"""Percentiles that stand for a distribution: low, median, high."""


@dataclass(frozen=True, kw_only=True)
class SurveyedImage:
    """What is kept of an image that was looked at."""

    image_id: str
    subset: str
    height: int
    width: int
    pixels: Mapping[int, int]
    """Of each class that it shows, at original size."""
    digest: str = ""
    """Of the picture's pixels, so that the same picture under two names is found; "": not looked at."""
    notes: tuple[str, ...] = ()
    """What the reader decided about it, in words."""

    def share(self, class_id: int) -> float:
        """Of the picture that the class covers, 0 to 1."""
        return self.pixels[class_id] / (self.height * self.width)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong with the files."""

    where: str
    """The image or file; the data set's place where it concerns all of it."""
    what: str
    """What was expected, what was found, what to do."""
    stops: bool
    """Whether a job on these files would end with it."""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """What a reader decided about the files, or left aside, that is no fault."""

    what: str
    images: int = 0
    """That it concerns; 0: the data set as a whole."""
    first: str = ""
    """One of them."""


@dataclass(frozen=True, kw_only=True)
class FoldPairs:
    """The (image, class) pairs of a fold, as the job draws them."""

    fold: int
    training_classes: tuple[int, ...]
    held_out: tuple[int, ...]
    """Base classes kept out of training for choosing the best epoch."""
    novel: tuple[int, ...]
    candidates: tuple[Pair, ...]
    """Of base classes, before images that show a novel class are taken out."""
    kept: tuple[Pair, ...]
    """After that, those of held-out classes included."""
    test: tuple[Pair, ...]
    origin: str = ""
    """Where the pairs are from: list files or the rule."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of a distribution: percentiles 10, 50 and 90."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """A class in all images."""

    class_id: int
    name: str
    images: int
    """That show it at all."""
    large_enough: int
    """Of those, with as many pixels of it as a pair needs."""
    alone: int
    """Of those, that show no other class."""
    pixels: int
    share: Spread | None
    """Of a picture that the class covers, 0 to 1, over the images that show it; None without any."""
    tiny: int
    """Images in which it covers less than `TINY_PX` at the training size."""
    marked_all: float
    """IoU, 0 to 1, of marking every pixel in the images large enough: what costs nothing."""


@dataclass(frozen=True, kw_only=True)
class Few:
    """A class with fewer images than an episode needs."""

    name: str
    images: int
    role: str
    """For what: `test`, `training`, or `choosing the epoch`."""


@dataclass(frozen=True, kw_only=True)
class FoldFacts:
    """What a fold trains and tests on."""

    fold: int
    novel: tuple[str, ...]
    training_classes: tuple[str, ...]
    held_out: tuple[str, ...]
    training_pairs: int
    """Of the training classes, after removal."""
    training_images: int
    base_pairs: int
    """Of base classes, held-out ones included, before removal."""
    removed_pairs: int
    """Of those, because their image shows a novel class."""
    removed_by: Mapping[str, int]
    """Pairs removed for each novel class, most first; one that shows two counts for both."""
    test_pairs: int
    test_images: int
    few: tuple[Few, ...]
    marked_all: float
    """mIoU, 0 to 1, of marking every pixel of the test images."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The whole data set."""

    dataset: str
    class_names: tuple[str, ...]
    images: int
    without_objects: int
    """Images that show no class."""
    min_object_px: int
    image_size_px: int
    shot: int
    height: Spread
    width: Spread
    smallest: tuple[int, int]
    """Height and width of the image with the fewest pixels."""
    largest: tuple[int, int]
    elongated: int
    """Images with one side more than twice the other."""
    classes: tuple[ClassFacts, ...]
    together: tuple[tuple[int, ...], ...]
    """Images that show both classes, by class id twice; the diagonal holds a class's own."""
    folds: tuple[FoldFacts, ...]
    problems: tuple[Problem, ...]
    remarks: tuple[Remark, ...]
    idle: tuple[str, ...]
    """Classes that no image shows and no fold needs."""
    sizes: tuple[tuple[int, int, int], ...]
    """Height, width and number of pictures; of at most `MOST_SIZES`, the most frequent first."""

    @property
    def small(self) -> tuple[ClassFacts, ...]:
        """Classes with fewer than shot + 1 images large enough: no episode can be made of them in any fold."""
        few = (found for found in self.classes if found.large_enough < self.shot + 1)
        return tuple(found for found in few if found.name not in self.idle)

    @property
    def stops(self) -> bool:
        """Whether a job on these files would end with an error about them."""
        return any(problem.stops for problem in self.problems)


MOST_SIZES = 300
TINY_PX = 256
"""At the training size, pixels: four cells of the finest features, whose stride is 8."""
ELONGATED = 2.0


def survey(
    dataset: str,
    class_names: Sequence[str],
    images: Sequence[SurveyedImage],
    folds: Sequence[FoldPairs],
    problems: Sequence[Problem] = (),
    remarks: Sequence[Remark] = (),
    *,
    shot: int,
    min_object_px: int,
    image_size_px: int,
    idle: Sequence[int] = (),
) -> Survey:
    """Count. InputError where no image is left to count. `idle`: classes without an image that no fold needs."""
    if not images:
        first = f"; the first problem: {problems[0].what}" if problems else ""
        raise InputError(f"expected labelled images that can be read, found none{first}")
    heights = np.array([image.height for image in images])
    widths = np.array([image.width for image in images])
    areas = heights * widths
    ratio = np.maximum(heights, widths) / np.minimum(heights, widths)
    least, most = int(areas.argmin()), int(areas.argmax())
    together = _together(images, len(class_names))
    facts = tuple(_class_facts(c, name, images, min_object_px, image_size_px) for c, name in enumerate(class_names))
    return Survey(
        dataset=dataset,
        class_names=tuple(class_names),
        images=len(images),
        without_objects=sum(not any(image.pixels.values()) for image in images),
        min_object_px=min_object_px,
        image_size_px=image_size_px,
        shot=shot,
        height=_spread(heights),
        width=_spread(widths),
        smallest=(int(heights[least]), int(widths[least])),
        largest=(int(heights[most]), int(widths[most])),
        elongated=int((ratio > ELONGATED).sum()),
        classes=facts,
        together=tuple(tuple(row) for row in together.tolist()),
        folds=tuple(_fold_facts(pairs, facts, images, shot) for pairs in folds),
        problems=tuple(problems),
        remarks=(*remarks, *_noted(images)),
        idle=tuple(class_names[c] for c in idle),
        sizes=tuple((h, w, n) for (h, w), n in Counter((i.height, i.width) for i in images).most_common(MOST_SIZES)),
    )


def fold_pairs(
    partition: Partition,
    lists: SplitLists,
    kept: tuple[Pair, ...],
    images: Sequence[SurveyedImage],
    held_out: tuple[int, ...] = (),
) -> FoldPairs:
    """A fold's pairs from its lists and what removal keeps of them. InputError for lists of other images."""
    known = {image.image_id for image in images}
    absent = {image_id for image_id, _ in (*lists.train, *lists.val)} - known
    if absent:
        raise InputError(
            f"expected every image of the split lists among those that can be used, found {len(absent):,} missing "
            f"(first: {min(absent)}); mend those images, or give the lists made for this data"
        )
    return FoldPairs(
        fold=lists.fold,
        training_classes=tuple(c for c in partition.base(lists.fold) if c not in held_out),
        held_out=held_out,
        novel=partition.tested(lists.fold),
        candidates=lists.train,
        kept=kept,
        test=lists.val,
        origin=lists.origin,
    )


def _noted(images: Iterable[SurveyedImage]) -> Iterator[Remark]:
    noted: dict[str, list[str]] = {}
    for image in images:
        for note in image.notes:
            noted.setdefault(note, []).append(image.image_id)
    for note, names in noted.items():
        yield Remark(what=note, images=len(names), first=names[0])


def _spread(values: Float[np.ndarray, " n"] | Int64[np.ndarray, " n"]) -> Spread:
    low, median, high = (float(value) for value in np.percentile(values, SPREAD))
    return Spread(low=low, median=median, high=high)


def _together(images: Iterable[SurveyedImage], classes: int) -> Int64[np.ndarray, "c c"]:
    counts = np.zeros((classes, classes), dtype=np.int64)
    for image in images:
        shown = np.array([c for c, n in image.pixels.items() if n], dtype=np.int64)
        counts[np.ix_(shown, shown)] += 1
    return counts


def _class_facts(
    class_id: int, name: str, images: Sequence[SurveyedImage], min_object_px: int, image_size_px: int
) -> ClassFacts:
    shown = [image for image in images if image.pixels.get(class_id)]
    usable = [image for image in shown if image.pixels[class_id] >= min_object_px]
    shares = np.array([image.share(class_id) for image in shown])
    return ClassFacts(
        class_id=class_id,
        name=name,
        images=len(shown),
        large_enough=len(usable),
        alone=sum(sum(n > 0 for n in image.pixels.values()) == 1 for image in shown),
        pixels=sum(image.pixels[class_id] for image in shown),
        share=_spread(shares) if shown else None,
        tiny=int((shares * image_size_px**2 < TINY_PX).sum()),
        # At the square training size every image has as many pixels: shares add up, pixels would not.
        marked_all=float(np.mean([image.share(class_id) for image in usable])) if usable else 0.0,
    )


def _fold_facts(
    pairs: FoldPairs, classes: Sequence[ClassFacts], images: Sequence[SurveyedImage], shot: int
) -> FoldFacts:
    def named(ids: Iterable[int]) -> tuple[str, ...]:
        return tuple(classes[c].name for c in ids)

    training = [pair for pair in pairs.kept if pair[1] in set(pairs.training_classes)]
    removed = set(pairs.candidates) - set(pairs.kept)  # a list file may name a pair twice
    known = {image.image_id: image for image in images}
    novel = set(pairs.novel)
    removed_by = Counter(classes[c].name for image_id, _ in removed for c in known[image_id].pixels if c in novel)
    shares: dict[int, list[float]] = {}
    for image_id, class_id in pairs.test:
        shares.setdefault(class_id, []).append(known[image_id].share(class_id))
    floors = [float(np.mean(of_class)) for of_class in shares.values()]
    few = (
        *_few(pairs.test, pairs.novel, classes, shot, "test"),
        *_few(training, pairs.training_classes, classes, shot, "training"),
        *_few(pairs.kept, pairs.held_out, classes, shot, "choosing the epoch"),
    )
    return FoldFacts(
        fold=pairs.fold,
        novel=named(pairs.novel),
        training_classes=named(pairs.training_classes),
        held_out=named(pairs.held_out),
        training_pairs=len(training),
        training_images=len({image_id for image_id, _ in training}),
        base_pairs=len(pairs.candidates),
        removed_pairs=len(pairs.candidates) - len(pairs.kept),
        removed_by=dict(removed_by.most_common()),
        test_pairs=len(pairs.test),
        test_images=len({image_id for image_id, _ in pairs.test}),
        few=few,
        marked_all=float(np.mean(floors)) if floors else 0.0,
    )


def _few(
    pairs: Sequence[Pair], wanted: Collection[int], classes: Sequence[ClassFacts], shot: int, role: str
) -> Iterator[Few]:
    from mshnet.data.episodes import small_classes

    for class_id, found in small_classes(pairs, wanted, shot).items():
        yield Few(name=classes[class_id].name, images=found, role=role)
