"""What a survey of a labelled data set says, as plain records. Loads neither numpy nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mshnet.data.splits import Pair

MOST_SIZES = 300
TINY_PX = 256
"""At the training size, pixels: four cells of the finest features, whose stride is 8."""


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
