"""What a labelled data set holds, before anything is trained on it: classes, sizes, folds, problems.

Pure: `survey` counts what `survey_walk` found in a source, or what the store's labels say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int64

from mshnet.data.folds import Partition
from mshnet.data.splits import Pair, SplitLists
from mshnet.data.survey_facts import (
    MOST_SIZES,
    TINY_PX,
    ClassFacts,
    Few,
    FoldFacts,
    FoldPairs,
    Problem,
    Remark,
    Spread,
    Survey,
    SurveyedImage,
)
from mshnet.errors import InputError

SPREAD = (10, 50, 90)
"""Percentiles that stand for a distribution: low, median, high."""
ELONGATED = 2.0
"""One side to the other."""


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
    showing: dict[int, list[SurveyedImage]] = {c: [] for c in range(len(class_names))}
    for image in images:
        for c, n in image.pixels.items():
            if n:
                showing[c].append(image)
    facts = tuple(_class_facts(c, name, showing[c], min_object_px, image_size_px) for c, name in enumerate(class_names))
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
    class_id: int, name: str, shown: Sequence[SurveyedImage], min_object_px: int, image_size_px: int
) -> ClassFacts:
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

    wanted = set(pairs.training_classes)
    training = [pair for pair in pairs.kept if pair[1] in wanted]
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
