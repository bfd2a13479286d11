"""What a survey's numbers mean for a cross-validation: what would stop it, what to look at, what to expect of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mshnet.data.survey_facts import FoldFacts, Survey

Weight = Literal["stops", "look", "note"]
"""The job refuses; worth a look before days of training; good to know."""
Small = Literal["leave-out", "merge"]

FEW_CLASSES = 8
"""Training classes below which comparing in general is hardly learnt. Pascal-5i has 15, COCO-20i 60."""
FEW_PAIRS = 1000
"""Likewise of training pairs; the smallest fold of Pascal-5i has 5,546."""
FEW_TESTED = 10
"""Test images of a class below which its IoU says little."""
NAMED = 8
"""Names in a sentence; more are counted."""
VOC_SHARE = 2048 / (500 * 375)
"""What the papers' smallest object is of a VOC picture."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """A sentence of the report."""

    weight: Weight
    title: str
    text: str


def expectations(found: Survey, *, skip_small_classes: bool = False, own: bool = True) -> list[Expectation]:
    """What stops the job first, then what to look at, then what is good to know.

    `own`: classes and folds can be chosen, which those of the field's data sets cannot.
    """
    every = [*_problems(found), *_small(found, skip_small_classes, own), *_few(found, skip_small_classes, own)]
    every += [*_classes(found, own), *_removal(found, own)]
    for rule in (_pairs, _objects, _pictures, _numbers):
        every += rule(found)
    order = ("stops", "look", "note")
    return sorted(every, key=lambda expectation: order.index(expectation.weight))


def class_choice(found: Survey, small: Small = "leave-out") -> dict[str, Any]:
    """A proposal for `--classes`: the small classes left out, or made one class "other" where that is large enough."""
    empty = {c.name for c in found.classes if not c.images}
    names = [*(c.name for c in found.small), *found.idle]
    together = [name for name in names if name not in empty]
    enough = sum(c.large_enough for c in found.small) >= found.shot + 1
    if small == "merge" and len(together) > 1 and enough:
        other = _fresh("other", {name for name in found.class_names if name not in together})
        return {"merge": {other: together}, "leave_out": sorted(empty)}
    return {"merge": {}, "leave_out": names}


def _fresh(name: str, taken: set[str]) -> str:
    number = 1
    fresh = name
    while fresh in taken:
        number += 1
        fresh = f"{name} {number}"
    return fresh


def _problems(found: Survey) -> Iterator[Expectation]:
    stopping = [problem for problem in found.problems if problem.stops]
    if stopping:
        yield Expectation(
            weight="stops",
            title=f"{_count(len(stopping), 'image or file', 'images or files')} cannot be used",
            text="The job ends with the first of them. They are named under “Problems”; mend them or take them out.",
        )
    if others := len(found.problems) - len(stopping):
        title = _count(others, "more problem", "more problems") if stopping else _count(others, "problem", "problems")
        yield Expectation(weight="look", title=title, text="They do not stop the job; see “Problems”.")


def _small(found: Survey, skip: bool, own: bool) -> Iterator[Expectation]:
    if not found.small:
        return
    names = _names([f"{c.name} ({c.large_enough})" for c in found.small])
    yield Expectation(
        weight="note" if skip else "stops",
        title=f"{_count(len(found.small), 'class has', 'classes have')} too few images",
        text=f"An episode of {found.shot}-shot needs {found.shot + 1} different images with at least "
        f"{found.min_object_px:,} px of its class. Too few: {names}. "
        + ("They are left out, as asked." if skip else _SMALL + (_SMALL_OWN if own else ".")),
    )


_SMALL = "Leave them out with --skip-small-classes"
_SMALL_OWN = ", or leave them out or merge them with --classes FILE: the proposal beside this report does it."


def _few(found: Survey, skip: bool, own: bool) -> Iterator[Expectation]:
    """Large enough in all, but not in a fold's share."""
    small = {c.name for c in found.small}
    roles: dict[str, dict[str, list[int]]] = {}
    for fold in found.folds:
        for few in fold.few:
            if few.name not in small:
                roles.setdefault(few.name, {}).setdefault(few.role, []).append(fold.fold)
    if roles:
        named = _names(
            [f"{name} ({'; '.join(_role(*of) for of in of_class.items())})" for name, of_class in roles.items()]
        )
        yield Expectation(
            weight="note" if skip else "stops",
            title=f"{_count(len(roles), 'class is', 'classes are')} too small within a fold",
            text=f"There are enough images in all, but not for what a fold needs them: {named}. "
            + ("They are left out there, as asked." if skip else _WITHIN + (_WITHIN_OWN if own else ".")),
        )


_WITHIN = "Leave them out (--skip-small-classes)"
_WITHIN_OWN = (
    ", or choose the folds yourself (--classes), so that classes which are seen in the same images stand in one fold."
)


def _role(role: str, folds: Sequence[int]) -> str:
    return f"{role}, {'fold' if len(folds) == 1 else 'folds'} {', '.join(map(str, folds))}"


def _classes(found: Survey, own: bool) -> Iterator[Expectation]:
    few = [fold for fold in found.folds if len(fold.training_classes) < FEW_CLASSES]
    if few:
        fewest = min(few, key=lambda fold: len(fold.training_classes))
        held = len(fewest.held_out)
        ways = ["more folds (--fold-count)"] if own else []
        if held:
            fewer = "--held-out-classes 1, or " if held > 1 else ""
            ways.append(f"fewer classes for choosing the epoch (now {held}: {fewer}--selection last)")
        advice = f"More remain for training with {' or '.join(ways)}" if ways else "More labelled classes help most"
        yield Expectation(
            weight="look",
            title=f"Few classes to learn from: {len(fewest.training_classes)} in fold {fewest.fold}",
            text="A model learns to compare from the variety of classes; Pascal-5i trains on 15, COCO-20i on 60. With "
            f"few it remembers these, and new ones come out worse. {advice}.",
        )


def _pairs(found: Survey) -> Iterator[Expectation]:
    if not found.folds:
        return
    counts = [fold.training_pairs for fold in found.folds]
    text = (
        f"A training episode is drawn from {_range(counts)} pairs of image and class a fold (Pascal-5i: 5,546 to "
        "10,575; COCO-20i: 95,000 to 141,000). Classes come in turn, so a frequent one is not seen more often."
    )
    if min(counts) < FEW_PAIRS:
        text += " With so few the same pictures come again and again: short trainings (--epochs) are enough."
        yield Expectation(weight="look", title=f"Few training pairs: {min(counts):,} in the smallest fold", text=text)
    else:
        yield Expectation(weight="note", title=f"{_range(counts)} training pairs a fold", text=text)


def _removal(found: Survey, own: bool) -> Iterator[Expectation]:
    def lost(fold: FoldFacts) -> float:
        return fold.removed_pairs / max(1, fold.base_pairs)

    worst = max(found.folds, key=lost, default=None)
    if worst is None or lost(worst) <= 0.3:
        return
    by = ", ".join(f"{name} ({pairs:,})" for name, pairs in list(worst.removed_by.items())[:3])
    yield Expectation(
        weight="look",
        title=f"Fold {worst.fold} loses {_percent(lost(worst))} of its training pairs",
        text=f"Images that show a novel class are taken out of training: most for {by}. "
        + ("Classes that are often seen together belong in one fold (--classes). " if own else "")
        + "With --remove-novel no they stay"
        + (", and a third of all images is kept for the test instead. " if own else ". ")
        + "Then the model has seen novel classes, unlabelled, and its numbers say less of new ones.",
    )


def _objects(found: Survey) -> Iterator[Expectation]:
    shown = sum(c.images for c in found.classes)
    dropped = shown - sum(c.large_enough for c in found.classes)
    if shown and dropped / shown > 0.2:
        area = found.height.median * found.width.median
        like_voc = max(1, round(VOC_SHARE * area))
        # Where the pictures are as large as VOC's the limit is right, and the objects are small.
        advice = (
            f" In a VOC picture that limit is {_percent(VOC_SHARE)}; the same share of yours is "
            f"--min-object-px {like_voc}."
            if like_voc < 0.8 * found.min_object_px
            else ""
        )
        yield Expectation(
            weight="look",
            title=f"{_percent(dropped / shown)} of the objects count as too small",
            text=f"Pairs need {found.min_object_px:,} px of their class (--min-object-px), which {dropped:,} of "
            f"{shown:,} do not have; they are neither query nor support.{advice}",
        )
    tiny = [c for c in found.classes if c.images and c.tiny / c.images > 0.25]
    if tiny:
        yield Expectation(
            weight="look",
            title=f"{_count(len(tiny), 'class is', 'classes are')} tiny at the training size",
            text=f"At {found.image_size_px} px a quarter or more of their objects cover less than 16×16 px, four cells "
            f"of the finest features: {_names([f'{c.name} ({_percent(c.tiny / c.images)})' for c in tiny])}. Cut "
            "pictures and masks into tiles for the data set, or train larger (--image-size-px).",
        )
    whole = [c.name for c in found.classes if c.share is not None and c.share.median > 0.9]
    if whole:
        yield Expectation(
            weight="look",
            title=f"{_count(len(whole), 'class covers', 'classes cover')} nearly the whole picture",
            text=f"More than 90 % of it in half of the images: {_names(whole)}. Were object and background exchanged "
            "when the masks were made?",
        )


def _pictures(found: Survey) -> Iterator[Expectation]:
    if found.idle:
        yield Expectation(
            weight="note",
            title=f"{_count(len(found.idle), 'class is', 'classes are')} never seen",
            text=f"No image shows {_names(found.idle)}: no fold trains on them or tests them.",
        )
    if found.without_objects:
        yield Expectation(
            weight="note",
            title=f"{_count(found.without_objects, 'image shows', 'images show')} no class",
            text="Nothing is trained or tested on them.",
        )
    if found.elongated / found.images > 0.1:
        yield Expectation(
            weight="look",
            title=f"{_percent(found.elongated / found.images)} of the pictures are more than twice as long as wide",
            text="Pictures are squeezed into a square for the network. Cut into tiles they keep their shapes.",
        )
    side = math.sqrt(found.height.median * found.width.median)
    if side < 0.8 * found.image_size_px:
        yield Expectation(
            weight="note",
            title=f"The pictures are smaller than the training size of {found.image_size_px} px",
            text=f"Half of them have {found.width.median:.0f}×{found.height.median:.0f} px or less. Enlarging them "
            f"takes time and shows nothing new: --image-size-px {max(33, 8 * round(side / 8) + 1)} is quicker.",
        )


def _numbers(found: Survey) -> Iterator[Expectation]:
    floors = [fold.marked_all for fold in found.folds if fold.test_pairs]
    if floors:
        low, high = _percent(min(floors)), _percent(max(floors))
        yield Expectation(
            weight="note",
            title=f"What costs nothing: about {low if low == high else f'{low} to {high}'} mIoU",
            text="So much comes of marking every pixel of every query, by the sizes of the objects alone. A trained "
            "model has to be well above; the job measures this baseline and others too.",
        )
    rare = [c for c in found.classes if found.shot + 1 <= c.large_enough < FEW_TESTED]
    if rare:
        yield Expectation(
            weight="look",
            title=f"{_count(len(rare), 'class has', 'classes have')} few pictures to be tested on",
            text=f"Fewer than {FEW_TESTED}: {_names([f'{c.name} ({c.large_enough})' for c in rare])}. Episodes repeat "
            "them, so the class's IoU hangs on a few pictures, and its interval does not say so.",
        )


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _range(numbers: Iterable[int]) -> str:
    low, high = min(numbers := list(numbers)), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def words(choice: Mapping[str, Any]) -> str:
    """A proposal in a sentence."""
    parts = [f"one class {name!r} of {', '.join(names)}" for name, names in choice["merge"].items()]
    if choice["leave_out"]:
        parts.append(f"without {', '.join(choice['leave_out'])}")
    text = "; ".join(parts) or "all classes as they are"
    return text[:1].upper() + text[1:]
