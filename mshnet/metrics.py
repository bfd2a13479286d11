"""mIoU and FB-IoU from integer counts, so that the number of workers cannot change a bit of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from mshnet.config import IGNORE_INDEX


@dataclass(frozen=True)
class Counts:
    """Intersection and union in pixels; the last axis is background, foreground."""

    intersection: Int64[np.ndarray, "*n 2"]
    union: Int64[np.ndarray, "*n 2"]


def count_pixels(predicted: Bool[Tensor, "b H W"], truth: UInt8[Tensor, "b H W"]) -> Int64[Tensor, "2 b 2"]:
    """Each episode's intersections and unions, pixels labelled 255 left out; on the device, which is not waited for."""
    valid = truth != IGNORE_INDEX
    true_foreground = truth == 1
    pairs = (
        (~predicted & valid, ~true_foreground & valid),
        (predicted & valid, true_foreground & valid),
    )
    intersection = torch.stack([(p & t).sum((1, 2)) for p, t in pairs], dim=-1)
    union = torch.stack([(p | t).sum((1, 2)) for p, t in pairs], dim=-1)
    return torch.stack([intersection, union])


def truth_pixels(truth: UInt8[Tensor, "b H W"]) -> Int64[Tensor, "2 b"]:
    """Of each episode how many pixels the object has, and how many count at all; on the device."""
    return torch.stack([(truth == 1).sum((1, 2)), (truth != IGNORE_INDEX).sum((1, 2))])


def fetched(counts: Int64[Tensor, "2 b 2"]) -> Counts:
    """The counts of `count_pixels` on the host."""
    intersection, union = counts.cpu().numpy()
    return Counts(intersection, union)


def episode_counts(predicted: Bool[Tensor, "b H W"], truth: UInt8[Tensor, "b H W"]) -> Counts:
    """Counts of each episode, pixels labelled 255 left out; arrays of shape (b, 2)."""
    return fetched(count_pixels(predicted, truth))


def sum_by_class(counts: Counts, class_ids: Sequence[int], classes: Sequence[int]) -> Counts:
    """Sum episodes' counts per class, in the order of `classes`; arrays of shape (len(classes), 2)."""
    row = {class_id: i for i, class_id in enumerate(classes)}
    rows = np.array([row[class_id] for class_id in class_ids], dtype=np.int64)
    intersection = np.zeros((len(classes), 2), dtype=np.int64)
    union = np.zeros_like(intersection)
    np.add.at(intersection, rows, counts.intersection)
    np.add.at(union, rows, counts.union)
    return Counts(intersection, union)


def class_iou(per_class: Counts) -> list[float]:
    """Foreground IoU per class, 0..1; nan for a class without any pixel in truth or prediction."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return [float(x) for x in per_class.intersection[:, 1] / per_class.union[:, 1]]


def miou(per_class: Counts) -> float:
    """Mean foreground IoU over the classes that occurred, 0..1 (paper, section 5.4)."""
    present = [value for value in class_iou(per_class) if not np.isnan(value)]
    return float(np.mean(present)) if present else 0.0


def fb_iou(per_class: Counts) -> float:
    """Mean of background and foreground IoU, the class ignored, 0..1 (paper, section 5.4)."""
    intersection, union = per_class.intersection.sum(0), per_class.union.sum(0)
    return float(np.mean(intersection / np.maximum(union, 1)))
