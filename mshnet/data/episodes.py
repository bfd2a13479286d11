"""Which images form an episode: the published test draws, our own test draws, and training's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int32

from mshnet.data.folds import class_names as names_of
from mshnet.data.folds import novel_classes
from mshnet.data.splits import Pair
from mshnet.errors import InputError

_log = logging.getLogger(__name__)

ImageT = TypeVar("ImageT", bound=str | int)


@dataclass(frozen=True, slots=True)
class Episode(Generic[ImageT]):
    """One query image and k support images of a class. The query is never a support.

    An image is an id (str) where lists are drawn from, a row of the image store (int) where it is loaded.
    """

    query: ImageT
    supports: tuple[ImageT, ...]
    class_id: int

    @property
    def images(self) -> tuple[ImageT, ...]:
        """All of them, the query first."""
        return (self.query, *self.supports)

    def named(self: Episode[int], name: Callable[[int], str]) -> Episode[str]:
        """The same episode by image id."""
        return Episode(name(self.query), tuple(name(image) for image in self.supports), self.class_id)


@dataclass(frozen=True)
class NumberedPairs:
    """(image, class) pairs as two columns; an image is a row of the store, or a place in a list of ids."""

    images: Int32[np.ndarray, " n"]
    class_ids: Int32[np.ndarray, " n"]


def numbered(pairs: Sequence[Pair]) -> tuple[NumberedPairs, tuple[str, ...]]:
    """The pairs by number, and the image id of each number."""
    places: dict[str, int] = {}
    images = [places.setdefault(image_id, len(places)) for image_id, _ in pairs]
    class_ids = [class_id for _, class_id in pairs]
    return NumberedPairs(np.array(images, np.int32), np.array(class_ids, np.int32)), tuple(places)


def small_classes(pairs: Sequence[Pair], classes: Collection[int], shot: int) -> dict[int, int]:
    """Classes that cannot form an episode, with the number of distinct images (below shot + 1) they have."""
    return {c: len(pool) for c, pool in _pools(numbered(pairs)[0], classes).items() if len(pool) < shot + 1}


def usable_classes(
    pairs: Sequence[Pair],
    classes: Collection[int],
    shot: int,
    *,
    skip_small_classes: bool = False,
    class_names: Sequence[str] = (),
) -> tuple[int, ...]:
    """The other classes, ascending. InputError, naming them, where there are small ones that may not be left out."""
    return tuple(_usable_pools(numbered(pairs)[0], classes, shot, skip_small_classes, class_names))


def published_episodes(
    dataset: str,
    val: Sequence[Pair],
    fold: int,
    shot: int,
    count: int = 1000,
    seed: int = 0,
    *,
    skip_small_classes: bool = False,
) -> list[Episode[str]]:
    """The test episodes of the published evaluation, exactly; `val` is the field's list in file order.

    One `RandomState(seed)`; every draw is `choice(n, 1, replace=False)[0]`. The official episodes are those of
    seed 0, and a shorter list is the start of a longer one. Pascal walks the list, its line is query and class:
    another seed draws other supports. COCO draws the class, then the query. Supports may repeat each other,
    never the query.
    InputError where a class of the fold has fewer than shot + 1 images (with one image the draw would never
    end), or a seed is not 0..2^32 - 1. `skip_small_classes` draws among the other classes, which is *not* the
    published protocol any more if `small_classes` is not empty: record it under another name.
    """
    _check_counts(shot, count)
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed of the published draw must be 0..2^32 - 1, got {seed}")
    novel, names = novel_classes(dataset, fold), names_of(dataset)
    classes = usable_classes(val, novel, shot, skip_small_classes=skip_small_classes, class_names=names)
    walk = [pair for pair in val if pair[1] in set(classes)]
    images: dict[int, list[str]] = {c: [] for c in classes}
    for image_id, class_id in walk:
        images[class_id].append(image_id)
    random = np.random.RandomState(seed)

    def draw(n: int) -> int:
        # Permutes all n, so `randint` would give other numbers.
        return int(random.choice(n, 1, replace=False)[0])

    episodes = []
    for index in range(count):
        if dataset == "coco":
            class_id = classes[draw(len(classes))]
            query = images[class_id][draw(len(images[class_id]))]
        else:
            query, class_id = walk[index % len(walk)]
        supports: list[str] = []
        while len(supports) < shot:
            drawn = images[class_id][draw(len(images[class_id]))]
            if drawn != query:
                supports.append(drawn)
        episodes.append(Episode(query, tuple(supports), class_id))
    return episodes


def sampled_episodes(
    val: Sequence[Pair], shot: int, count: int, seed: int, class_names: Sequence[str] = ()
) -> list[Episode[str]]:
    """Our own test protocol: classes in balanced turns, query and supports all different images.

    Classes with fewer than shot + 1 images are left out (`small_classes` says which; a warning names them).
    """
    _check_counts(shot, count)
    classes = sorted({class_id for _, class_id in val})
    pairs, ids = numbered(val)
    sampler = TrainingSampler(
        pairs, classes, shot, seed, count, skip_small_classes=True, class_names=class_names, stream=1
    )
    return [sampler.episode(0, position).named(ids.__getitem__) for position in range(count)]


class TrainingSampler:
    """Training episodes as a pure function of (seed, epoch, position): no state, no order of calls.

    Positions come in blocks as long as there are classes; each class has one place in a block, by a
    permutation of (seed, epoch, block). Query and supports are different images, all equally likely.
    Drawn from the raw 64-bit output of a counter-based generator (Philox), which NumPy promises never to
    change; so an epoch's order does not depend on NumPy's version, workers, loader processes or restarts.

    Keeps 4 bytes a pair and nothing of the columns given; building it takes 1 byte a pair more, and 26 bytes
    a pair of the largest class.
    """

    def __init__(
        self,
        pairs: NumberedPairs,
        classes: Collection[int],
        shot: int,
        seed: int,
        episodes_per_epoch: int,
        *,
        skip_small_classes: bool = False,
        class_names: Sequence[str] = (),
        stream: int = 0,
    ) -> None:
        """`class_names` (by class id) are for messages; samplers of one seed and another `stream` differ."""
        _check_counts(shot, episodes_per_epoch)
        if not 0 <= seed < 1 << 64:
            raise InputError(f"seed must be 0..2^64 - 1, got {seed}")
        self.shot = shot
        self.seed = seed
        self.stream = stream
        self.episodes_per_epoch = episodes_per_epoch
        self._pools = _usable_pools(pairs, classes, shot, skip_small_classes, class_names)
        self.classes = tuple(self._pools)

    def __len__(self) -> int:
        return self.episodes_per_epoch

    def episode(self, epoch: int, position: int) -> Episode[int]:
        """The episode at a position (0..episodes_per_epoch - 1) of an epoch (0 or more)."""
        if epoch < 0 or not 0 <= position < self.episodes_per_epoch:
            raise IndexError(f"no position {position} in epoch {epoch} of {self.episodes_per_epoch} episodes")
        block, place = divmod(position, len(self.classes))
        order = np.argsort(self._raw(epoch, block, 0, len(self.classes)), kind="stable")
        class_id = self.classes[int(order[place])]
        pool = self._pools[class_id]
        query, *supports = (int(pool[i]) for i in _distinct(self._raw(epoch, position, 1, self.shot + 1), len(pool)))
        return Episode(query, tuple(supports), class_id)

    def _raw(self, epoch: int, index: int, purpose: int, count: int) -> list[int]:
        # The lowest counter word stays free: it is the one that moves while drawing.
        # As uint64 arrays: NumPy takes a list with a number above 2^63 through floats.
        key = np.array([self.seed, self.stream], dtype=np.uint64)
        bits = np.random.Philox(key=key, counter=np.array([0, index, epoch, purpose], dtype=np.uint64))
        return [int(x) for x in bits.random_raw(count)]


def _distinct(raw: Sequence[int], n: int) -> list[int]:
    """len(raw) different numbers of 0..n-1: the first steps of a Fisher-Yates shuffle, without the list."""
    moved: dict[int, int] = {}
    drawn = []
    for i, x in enumerate(raw):
        j = i + x % (n - i)  # the modulo's bias is below n / 2^64
        drawn.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return drawn


def _pools(pairs: NumberedPairs, classes: Collection[int]) -> dict[int, Int32[np.ndarray, " n"]]:
    """Each class's images, each once, in order of first appearance: on it depends what is drawn."""
    return {c: _distinct_in_order(pairs.images[pairs.class_ids == c]) for c in sorted(set(classes))}


def _distinct_in_order(images: Int32[np.ndarray, " all"]) -> Int32[np.ndarray, " distinct"]:
    _, first = np.unique(images, return_index=True)
    return images[np.sort(first)]


def _usable_pools(
    pairs: NumberedPairs, classes: Collection[int], shot: int, skip: bool, class_names: Sequence[str]
) -> dict[int, Int32[np.ndarray, " n"]]:
    """The pools of shot + 1 images or more."""
    pools = _pools(pairs, classes)
    small = {c: len(pool) for c, pool in pools.items() if len(pool) < shot + 1}
    named = [f"{class_names[c] if c < len(class_names) else f'class {c}'} ({found})" for c, found in small.items()]
    if small and not skip:
        raise InputError(
            f"every class needs {shot + 1} images or more for {shot}-shot episodes; "
            f"too few: {', '.join(named)}; give more labelled images, fewer shots, "
            "leave these classes out (--skip-small-classes), or merge your own data's with others (--classes)"
        )
    if len(small) == len(pools):
        raise InputError(
            f"no class has the {shot + 1} images that {shot}-shot episodes need (of {len(small)} classes): "
            "give more labelled images or fewer shots"
        )
    if small:
        _log.warning("left out, fewer than %d images: %s", shot + 1, ", ".join(named))
    return {c: pool for c, pool in pools.items() if c not in small}


def _check_counts(shot: int, count: int) -> None:
    if shot < 1:
        raise InputError(f"shot must be 1 or more, got {shot}")
    if count < 1:
        raise InputError(f"the number of episodes must be 1 or more, got {count}")
