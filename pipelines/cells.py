"""The cells of the paper's tables 2, 3 and 4: which cross-validations it takes to fill them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mshnet.data.folds import FOLDS
from mshnet.errors import InputError

BACKBONES = ("resnet50", "resnet101")
SHOTS = (1, 5)
MEAN, FB_IOU = "mIoU", "FB-IoU"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper."""

    number: int
    dataset: str
    similarities: tuple[str, ...]
    title: str
    fb_iou: bool = True
    """Whether it has that column (table 3 here, not in the paper)."""

    @property
    def columns(self) -> list[str]:
        """Of one number of supports."""
        return [*(f"fold {fold}" for fold in range(FOLDS)), MEAN, *([FB_IOU] if self.fb_iou else [])]


TABLES: dict[int, Table] = {
    2: Table(number=2, dataset="pascal", similarities=("both",), title="1-shot and 5-shot segmentation on Pascal-5i"),
    3: Table(number=3, dataset="coco", similarities=("both",), title="1-shot and 5-shot segmentation on COCO-20i"),
    4: Table(
        number=4,
        dataset="pascal",
        similarities=("cosine", "prototype", "both"),
        title="One similarity alone on Pascal-5i",
        fb_iou=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cross-validation: a row's half, four folds wide."""

    dataset: str
    backbone: str
    similarity: str
    shot: int

    @property
    def words(self) -> tuple[str, ...]:
        """What tells it from others."""
        return (self.dataset, f"{self.shot}-shot", self.backbone, self.similarity)

    @property
    def label(self) -> str:
        """One line."""
        return " ".join(self.words)


def cells(
    tables: Sequence[int],
    datasets: Sequence[str] = (),
    backbones: Sequence[str] = (),
    shots: Sequence[int] = (),
    similarities: Sequence[str] = (),
) -> list[Cell]:
    """The distinct cells of some tables, in their order; a sequence that is not empty stands for the tables' own.

    Raises InputError for a table that the paper does not have, or none at all.
    """
    unknown = [number for number in tables if number not in TABLES]
    if unknown or not tables:
        raise InputError(f"tables must be of {', '.join(map(str, TABLES))} and at least one, got {tuple(tables)}")
    found: dict[Cell, None] = {}
    for number in tables:
        table = TABLES[number]
        for dataset, backbone, similarity, shot in itertools.product(
            datasets or (table.dataset,), backbones or BACKBONES, similarities or table.similarities, shots or SHOTS
        ):
            found[Cell(dataset=dataset, backbone=backbone, similarity=similarity, shot=shot)] = None
    return list(found)
