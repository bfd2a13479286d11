"""The fold table: ours, the baselines, and the paper's row for the same setting, as rows and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mshnet.config import ARCHITECTURES
from mshnet.data.folds import FOLDS, OWN_DATASETS
from pipelines import paper_numbers
from pipelines.results import BASELINES, GIVEN, CrossValidation, FoldResult, Interval

LABELS = {
    "untrained": "same network, untrained",
    "foreground": "everything is foreground",
    "prototype": "prototype matching, no training",
}
CHOSEN_ON_TEST_NOTE = "epoch chosen on the test episodes"
"""Beside every number made so."""
NO_PAPER_ROW = "not in the paper"
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of the fold table: mIoU in % per fold, their mean, FB-IoU; None where there is no number."""

    key: str
    label: str
    values: tuple[float | None, ...]
    intervals: tuple[Interval | None, ...] = ()
    """In %, one for each value, or none at all."""

    @property
    def cells(self) -> list[str]:
        """The values as text."""
        return [percent(value) for value in self.values]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """How one thing was done here and in the paper."""

    name: str
    here: str
    paper: str


def percent(value: float | None) -> str:
    """A number already in %, to one decimal; a dash where there is none."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.1f}"


def interval_text(interval: Interval | None) -> str:
    """An interval already in %, to one decimal; a dash where it is not known."""
    return NOTHING if interval is None else f"[{percent(interval.low)}, {percent(interval.high)}]"


def in_percent(interval: Interval | None) -> Interval | None:
    """An interval of IoU from 0 to 1, in %."""
    return interval and Interval(low=100 * interval.low, high=100 * interval.high)


def network_name(architecture: str) -> str:
    """`CrossValidation.architecture` as tables name it."""
    return next((title for name, title in ARCHITECTURES.items() if name == architecture), architecture)


def trained_label(architecture: str, given: bool = False) -> str:
    """The row of a trained network, or of one whose weights were given."""
    return f"{network_name(architecture)}, {GIVEN if given else 'trained'}"


def table_header(result: CrossValidation) -> list[str]:
    """Column names of the fold table, the first column's left out."""
    return [*(f"fold {fold.fold}" for fold in result.folds), "mean", "FB-IoU"]


def table_rows(result: CrossValidation) -> list[TableRow]:
    """The trained network, the baselines that were measured, the paper's row if it has one."""
    ours = [100 * fold.score.miou for fold in result.folds]
    note = f", {CHOSEN_ON_TEST_NOTE}" if result.chosen_on_test else ""
    ours += [100 * result.mean_miou, 100 * result.mean_fb_iou]
    known = [in_percent(fold.score.miou_interval) for fold in result.folds]
    known += [in_percent(result.miou_interval), in_percent(result.fb_iou_interval)]
    rows = [
        TableRow(
            key="trained",
            label=trained_label(result.architecture, result.given) + note,
            values=tuple(ours),
            intervals=tuple(known) if any(known) else (),
        )
    ]
    for key in BASELINES:
        scores = [fold.baselines.get(key) for fold in result.folds]
        if any(scores):
            by_fold = [None if score is None else 100 * score.miou for score in scores]
            fb_iou = _mean([None if score is None else 100 * score.fb_iou for score in scores])
            rows.append(_row(key, [*by_fold, _mean(by_fold), fb_iou]))
    paper = paper_row(result)
    if paper:
        by_fold = [paper.fold_miou[fold.fold] for fold in result.folds]
        whole = len(by_fold) == len(paper.fold_miou)
        values = [*by_fold, paper.mean_miou if whole else _mean(by_fold), paper.fb_iou if whole else None]
        rows.append(TableRow(key="paper", label=f"paper, table {paper.table}", values=tuple(values)))
    return rows


def _row(key: str, values: Sequence[float | None]) -> TableRow:
    return TableRow(key=key, label=LABELS[key], values=tuple(values))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def paper_row(result: CrossValidation) -> paper_numbers.PaperRow | None:
    """The paper's row for this run's data set, backbone, similarity and shot; None for another network."""
    if result.architecture != "mshnet":
        return None
    return paper_numbers.paper_row(result.dataset, result.backbone, result.similarity, result.shot)


def facts(result: CrossValidation) -> list[Fact]:
    """What has to agree before two numbers can be compared."""
    folds = result.folds
    there = paper_row(result) is not None
    pairs = [
        ("test episodes", _by_fold(folds, [f.protocol.label for f in folds]), paper_numbers.PROTOCOL),
        ("checkpoint", _by_fold(folds, [f.selection for f in folds]), paper_numbers.SELECTION),
        ("split lists", _by_fold(folds, [f.protocol.split_lists for f in folds]), paper_numbers.SPLIT_LISTS),
        (
            "training images with a novel class",
            _by_fold(folds, [novel_images(f) for f in folds]),
            paper_numbers.NOVEL_IMAGES.get(result.dataset, NOTHING),
        ),
        ("masks", result.mask_mode, paper_numbers.MASK_MODES.get(result.dataset, NOTHING)),
        ("image size", f"{result.image_size_px} px", f"{paper_numbers.IMAGE_SIZE_PX} px"),
        (
            "learnable parameters",
            f"{result.learnable_parameters:,}",
            paper_numbers.PARAMETERS.get(result.similarity, NOTHING),
        ),
    ]
    return [Fact(name=name, here=here, paper=paper if there else NO_PAPER_ROW) for name, here, paper in pairs]


def fact_table(result: CrossValidation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of `facts`; of one's own data the paper says nothing."""
    found = facts(result)
    if not beside_paper(result):
        return ["", "here"], [[fact.name, fact.here] for fact in found]
    return ["", "here", "paper"], [[fact.name, fact.here, fact.paper] for fact in found]


def beside_paper(result: CrossValidation) -> bool:
    """Whether a reader would look for the paper's numbers: on any data but their own."""
    return result.dataset not in OWN_DATASETS


def novel_images(fold: FoldResult) -> str:
    """What training did with images that show a novel class."""
    if fold.given:
        return "not known"
    return "left out" if fold.protocol.novel_removed else "kept"


def _by_fold(folds: Sequence[FoldResult], values: Sequence[str]) -> str:
    if len(set(values)) <= 1:
        return values[0] if values else NOTHING
    return "; ".join(f"fold {fold.fold}: {value}" for fold, value in zip(folds, values, strict=True))


def setting(result: CrossValidation) -> str:
    """The run in one line."""
    similarity = "both similarities" if result.similarity == "both" else f"{result.similarity} similarity"
    network = f"{result.backbone}, {similarity}"
    if result.architecture != "mshnet":
        network = f"{result.backbone}, {network_name(result.architecture)}"
    own = {} if beside_paper(result) else result.config.get("own", {})
    data, folds = own.get("data_name") or result.dataset, own.get("fold_count", FOLDS)
    return f"{data}, {network}, {result.shot}-shot, {result.image_size_px} px, {len(result.folds)} of {folds} folds"


def fold_table_text(result: CrossValidation) -> str:
    """The fold table for a terminal: mIoU in % per fold, mean, FB-IoU; the paper's row last."""
    header, rows = table_header(result), table_rows(result)
    width = max(len(label) for label in [*(row.label for row in rows), "mIoU, %"])
    intervals = {row.key: [interval_text(known) for known in row.intervals] for row in rows if row.intervals}
    columns = [
        max(6, len(name), *(len(cells[position]) for cells in intervals.values()))
        for position, name in enumerate(header)
    ]

    def line(label: str, cells: Sequence[str]) -> str:
        return f"{label:<{width}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, columns, strict=True))

    rule = "-" * (width + sum(columns) + 2 * len(columns))
    lines = [setting(result), rule, line("mIoU, %", header), rule]
    for row in rows:
        lines.append(line(row.label, row.cells))
        if row.key in intervals:
            lines.append(line("  95 % interval", intervals[row.key]))
    if beside_paper(result) and not paper_row(result):
        lines.append(f"{'paper':<{width}}  {NO_PAPER_ROW}")
    return "\n".join([*lines, rule])
