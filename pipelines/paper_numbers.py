"""MSHNet's published results, beside which the report puts ours.

From the paper's tables 2 (Pascal-5i), 3 (COCO-20i) and 4 (one similarity alone); IoU in %.
"""

from __future__ import annotations

from dataclasses import dataclass

PARAMETERS = {"both": "29.6M", "cosine": "26.8M", "prototype": "25.9M"}
PROTOCOL = "1,000 random episodes per fold"
SELECTION = "best epoch on the test episodes (in the published code; the paper does not say)"
SPLIT_LISTS = "the field's list files"
MASK_MODES = {
    "pascal": "SegmentationClassAug, 255 left out",
    "coco": "one even-odd fill per class (in the published code: overlapping instances become holes)",
}
NOVEL_IMAGES = {"pascal": "left out", "coco": "kept (in the published code; the paper does not say)"}
IMAGE_SIZE_PX = 473


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of one table."""

    table: int
    fold_miou: tuple[float, float, float, float]
    mean_miou: float
    fb_iou: float | None = None
    """None where the paper prints none."""


# (dataset, backbone, similarity, shot)
ROWS: dict[tuple[str, str, str, int], PaperRow] = {
    ("pascal", "resnet50", "both", 1): PaperRow(
        table=2, fold_miou=(67.7, 71.8, 59.9, 62.4), mean_miou=65.5, fb_iou=77.8
    ),
    ("pascal", "resnet50", "both", 5): PaperRow(
        table=2, fold_miou=(71.3, 74.1, 65.7, 68.5), mean_miou=69.9, fb_iou=81.0
    ),
    ("pascal", "resnet101", "both", 1): PaperRow(
        table=2, fold_miou=(68.6, 73.1, 61.3, 63.9), mean_miou=66.7, fb_iou=77.7
    ),
    ("pascal", "resnet101", "both", 5): PaperRow(
        table=2, fold_miou=(73.0, 76.3, 68.1, 71.9), mean_miou=72.3, fb_iou=82.7
    ),
    ("coco", "resnet50", "both", 1): PaperRow(table=3, fold_miou=(39.6, 48.3, 45.5, 42.8), mean_miou=44.1),
    ("coco", "resnet50", "both", 5): PaperRow(table=3, fold_miou=(49.2, 62.5, 55.6, 52.0), mean_miou=54.8),
    ("coco", "resnet101", "both", 1): PaperRow(table=3, fold_miou=(41.3, 49.9, 46.4, 46.6), mean_miou=46.1),
    ("coco", "resnet101", "both", 5): PaperRow(table=3, fold_miou=(51.7, 62.6, 55.9, 53.8), mean_miou=56.0),
    ("pascal", "resnet50", "cosine", 1): PaperRow(table=4, fold_miou=(63.3, 66.0, 59.5, 55.4), mean_miou=61.1),
    ("pascal", "resnet50", "cosine", 5): PaperRow(table=4, fold_miou=(68.0, 71.1, 62.8, 63.6), mean_miou=66.4),
    ("pascal", "resnet50", "prototype", 1): PaperRow(table=4, fold_miou=(61.6, 69.2, 56.5, 50.5), mean_miou=59.5),
    ("pascal", "resnet50", "prototype", 5): PaperRow(table=4, fold_miou=(64.3, 70.6, 57.4, 53.4), mean_miou=61.4),
    ("pascal", "resnet101", "cosine", 1): PaperRow(table=4, fold_miou=(66.7, 70.2, 61.9, 60.0), mean_miou=64.7),
    ("pascal", "resnet101", "cosine", 5): PaperRow(table=4, fold_miou=(72.8, 74.9, 67.5, 69.0), mean_miou=71.1),
    ("pascal", "resnet101", "prototype", 1): PaperRow(table=4, fold_miou=(63.4, 70.3, 58.3, 54.6), mean_miou=61.7),
    ("pascal", "resnet101", "prototype", 5): PaperRow(table=4, fold_miou=(66.2, 71.3, 57.7, 57.2), mean_miou=63.1),
}


def paper_row(dataset: str, backbone: str, similarity: str, shot: int) -> PaperRow | None:
    """The paper's row for the same setting; None where the paper has none."""
    return ROWS.get((dataset, backbone, similarity, shot))
