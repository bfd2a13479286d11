"""What others published for the cells of the paper's tables 2 and 3; IoU in %.

The rows of the paper's own tables carry its reference numbers, and are as it prints them, also where another paper
prints something else. The later ones are the methods' own means; no folds are known here.
"""

from __future__ import annotations

from dataclasses import dataclass

Folds = tuple[float, float, float, float]


@dataclass(frozen=True)
class Published:
    """A method's numbers with one number of supports."""

    mean_miou: float
    fold_miou: Folds | None = None
    fb_iou: float | None = None
    """None where none is printed."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A row of a table."""

    method: str
    one_shot: Published | None
    five_shot: Published | None
    parameters: str = ""
    """Learnable ones, as printed."""
    later: bool = False
    """Not in the paper's table: published beside or after it."""

    def published(self, shot: int) -> Published | None:
        """Its numbers with so many supports; None where there are none."""
        return {1: self.one_shot, 5: self.five_shot}.get(shot)


def _row(
    method: str,
    one: tuple[Folds, float, float | None],
    five: tuple[Folds, float, float | None],
    parameters: str = "",
) -> Peer:
    def published(folds: Folds, mean: float, fb_iou: float | None) -> Published:
        return Published(mean, folds, fb_iou)

    return Peer(method=method, one_shot=published(*one), five_shot=published(*five), parameters=parameters)


def _later(method: str, one: float, five: float | None = None) -> Peer:
    return Peer(method=method, one_shot=Published(one), five_shot=None if five is None else Published(five), later=True)


# (dataset, backbone); in the paper's order.
PEERS: dict[tuple[str, str], tuple[Peer, ...]] = {
    ("pascal", "resnet50"): (
        _row("PANet [34]", ((44.0, 57.5, 50.8, 44.0), 49.1, None), ((55.3, 67.2, 61.3, 53.2), 59.3, None), "23.5M"),
        _row("PFENet [35]", ((61.7, 69.5, 55.4, 56.3), 60.8, 73.3), ((63.1, 70.7, 55.8, 57.9), 61.9, 73.9), "10.8M"),
        _row("HSNet [30]", ((64.3, 70.7, 60.3, 60.5), 64.0, 76.7), ((70.3, 73.2, 67.4, 67.1), 69.5, 80.6), "2.6M"),
        _row("CyCTR [36]", ((67.8, 72.8, 58.0, 58.0), 64.2, None), ((71.1, 73.2, 60.5, 57.5), 65.6, None)),
        _later("VAT", 65.3, 70.0),
        _later("SCCAN", 66.8, 70.3),
        _later("BAM", 67.8, 70.9),
        _later("MSANet", 68.5, 72.6),
    ),
    ("pascal", "resnet101"): (
        _row("FWB [42]", ((51.3, 64.5, 56.7, 52.2), 56.2, None), ((54.8, 67.4, 62.2, 55.3), 59.9, None), "43.0M"),
        _row("ASGNet [43]", ((59.8, 67.4, 55.6, 54.4), 59.3, 71.7), ((64.6, 71.3, 64.2, 57.3), 64.4, 75.2), "10.4M"),
        _row("PFENet [35]", ((60.5, 69.4, 54.4, 55.9), 60.1, 72.9), ((62.8, 70.4, 54.9, 57.6), 61.4, 77.5), "10.8M"),
        _row("HSNet [30]", ((67.3, 72.3, 62.0, 63.1), 66.2, 77.6), ((71.8, 74.4, 67.0, 68.3), 70.4, 80.6), "2.6M"),
        _row("CyCTR [36]", ((69.3, 72.7, 56.5, 58.6), 64.3, 72.9), ((73.5, 74.0, 58.6, 60.2), 66.6, 75.0)),
        _later("MSANet", 69.1, 74.0),
    ),
    ("coco", "resnet50"): (
        _row("PPNet [37]", ((28.1, 30.8, 29.5, 27.7), 29.0, None), ((39.0, 40.8, 37.1, 37.3), 38.5, None)),
        _row("RPMM [38]", ((29.5, 36.8, 29.0, 27.0), 30.6, None), ((33.8, 42.0, 33.0, 33.3), 35.5, None)),
        _row("CyCTR [36]", ((38.9, 43.0, 39.6, 39.8), 40.3, None), ((41.1, 48.9, 45.2, 47.0), 45.6, None)),
        _row("HSNet [30]", ((36.3, 43.1, 38.7, 38.7), 39.2, None), ((43.3, 51.3, 48.2, 45.0), 46.9, None)),
        _later("VAT", 41.3, 47.9),
        _later("DCAMA", 43.3, 48.3),
        _later("BAM", 46.2, 51.2),
        _later("HDMNet", 50.0, 56.0),
    ),
    ("coco", "resnet101"): (
        _row("FWB [39]", ((17.0, 18.0, 21.0, 28.9), 21.2, None), ((19.1, 21.5, 23.9, 30.1), 23.7, None)),
        _row("PFENet [35]", ((36.8, 41.8, 38.7, 36.7), 38.5, None), ((40.4, 46.8, 43.2, 40.5), 42.7, None)),
        _row("HSNet [30]", ((37.2, 44.1, 42.4, 41.3), 41.2, None), ((45.9, 53.0, 51.8, 47.1), 49.5, None)),
        _later("MSANet", 51.1, 56.8),
    ),
    # Other backbones than the paper's, trained on far more.
    ("coco", "foundation models"): (
        _later("Matcher", 52.7, 60.7),
        _later("FSSDINO", 58.5),
        _later("GF-SAM", 58.7),
    ),
}
