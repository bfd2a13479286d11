"""Charts as PNG files: learning curves, IoU by class, intervals, IoU by object size."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mshnet.errors import InputError
from mshnet.visualize.style import FOLD_COLOURS, SERIES_COLOURS

INK = "#222222"
Curve = Sequence[tuple[int, float, float | None]]
"""(epoch, training loss, validation mIoU or None) per epoch."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row of `interval_chart`: a value from 0 to 1, and what it may as well have been."""

    name: str
    value: float
    low: float
    high: float
    group: str = ""
    """Rows of a group stand together in one colour."""


def learning_curves(histories: Mapping[str, Curve]) -> bytes:
    """PNG: training loss and validation mIoU in % by epoch, one line per entry (a fold).

    Without any validation there is one chart only.
    """
    validated = any(miou is not None for curve in histories.values() for _, _, miou in curve)
    figure = figure_of(width=9.0 if validated else 5.2, height=3.2)
    charts = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    for colour, (name, curve) in zip(_cycle(FOLD_COLOURS, len(histories)), histories.items(), strict=True):
        style = {"color": colour, "label": name, "marker": "o", "markersize": 3, "linewidth": 1.6}
        charts[0].plot([epoch for epoch, _, _ in curve], [loss for _, loss, _ in curve], **style)
        if validated:
            points = [(epoch, 100 * miou) for epoch, _, miou in curve if miou is not None]
            charts[1].plot([epoch for epoch, _ in points], [miou for _, miou in points], **style)
    dress(charts[0], "training loss", "epoch", "loss")
    if validated:
        dress(charts[1], "mIoU on the episodes that choose the checkpoint", "epoch", "mIoU, %")
    if len(histories) > 1:
        charts[0].legend(frameon=False, fontsize=9)
    return rendered(figure)


def class_bars(
    scores: Mapping[str, Mapping[str, float]], intervals: Mapping[str, tuple[float, float]] | None = None
) -> bytes:
    """PNG: horizontal IoU bars in % per class, best class of the first series on top.

    `scores` is series name ("trained", then baselines) -> class name -> IoU (0 to 1). A class that a series
    lacks has no bar there. `intervals` are the first series', by class name: a whisker on its bar.
    """
    if not scores:
        raise InputError("expected at least one series of class IoU to draw, got none")
    first = next(iter(scores.values()))
    classes = sorted({name for series in scores.values() for name in series}, key=lambda name: first.get(name, -1.0))
    thickness = 0.8 / len(scores)
    figure = figure_of(width=5.8, height=1.0 + max(1, len(classes)) * (0.12 * len(scores) + 0.16))
    axes = figure.subplots()
    colours = _cycle(FOLD_COLOURS, len(scores))
    for rank, (series_name, series) in enumerate(scores.items()):
        shown = [(row, series[name]) for row, name in enumerate(classes) if math.isfinite(series.get(name, math.nan))]
        axes.barh(
            [row + 0.4 - thickness * (rank + 0.5) for row, _ in shown],
            [100 * iou for _, iou in shown],
            height=thickness * 0.9,
            color=SERIES_COLOURS.get(series_name, colours[rank]),
            label=series_name,
        )
        if rank == 0:
            for row, iou in shown:
                low, high = (intervals or {}).get(classes[row], (iou, iou))
                place = row + 0.4 - thickness / 2
                if low < high:
                    axes.plot([100 * low, 100 * high], [place, place], color=INK, linewidth=1.2, solid_capstyle="butt")
                axes.text(100 * max(high, iou) + 0.7, place, f"{100 * iou:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlim(left=0)
    axes.margins(x=0.08, y=0.02)
    dress(axes, "IoU by novel class", "IoU, %", "")
    axes.grid(visible=False, axis="y")
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=len(scores))
    return rendered(figure)


def interval_chart(rows: Sequence[Measured], title: str, unit: str) -> bytes:
    """PNG: a dot and its interval in % per row, in the order given, the first on top; a colour for each group."""
    if not rows:
        raise InputError("expected at least one number with its interval to draw, got none")
    groups = list(dict.fromkeys(row.group for row in rows))
    colours = dict(zip(groups, _cycle(FOLD_COLOURS, len(groups)), strict=True))
    # A gap before each group.
    places = [i + 0.6 * groups.index(row.group) for i, row in enumerate(rows)]
    figure = figure_of(width=6.4, height=0.9 + 0.23 * (places[-1] + 1))
    axes = figure.subplots()
    for place, row in zip(places, rows, strict=True):
        colour = colours[row.group]
        axes.plot([100 * row.low, 100 * row.high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(100 * row.value, place, marker="o", markersize=5, color=colour)
        label = f"{100 * row.value:.1f}"
        axes.annotate(label, (100 * row.high, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    dress(axes, title, unit, "")
    axes.grid(visible=False, axis="y")
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(colours[row.group])
    return rendered(figure)


def size_bars(scores: Mapping[str, Mapping[str, tuple[float, int]]]) -> bytes:
    """PNG: mIoU in % by object size, a bar per series (a fold); below each size the episodes of all.

    `scores` is series name -> size -> (mIoU 0 to 1, episodes); a size that a series lacks has no bar.
    """
    sizes = list(dict.fromkeys(size for series in scores.values() for size in series))
    if not sizes:
        raise InputError("expected at least one size to draw, got none")
    width = 0.8 / len(scores)
    figure = figure_of(width=1.2 + len(sizes) * max(1.4, 0.55 * len(scores)), height=3.0)
    axes = figure.subplots()
    for rank, (colour, (name, series)) in enumerate(
        zip(_cycle(FOLD_COLOURS, len(scores)), scores.items(), strict=True)
    ):
        shown = [(place, *series[size]) for place, size in enumerate(sizes) if size in series]
        places = [place - 0.4 + width * (rank + 0.5) for place, _, _ in shown]
        axes.bar(places, [100 * miou for _, miou, _ in shown], width=0.9 * width, color=colour, label=name)
        for place, (_, miou, _) in zip(places, shown, strict=True):
            label = f"{100 * miou:.1f}"
            axes.annotate(label, (place, 100 * miou), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    counts = {size: sum(series[size][1] for series in scores.values() if size in series) for size in sizes}
    axes.set_xticks(range(len(sizes)), [f"{size}\n{counts[size]:,} episodes" for size in sizes])
    axes.margins(y=0.12)
    dress(axes, "mIoU by the size of the query's object", "", "mIoU, %")
    axes.grid(visible=False, axis="x")
    if len(scores) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=len(scores))
    return rendered(figure)


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def figure_of(width: float, height: float) -> Any:
    """An empty figure of matplotlib's, inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")


def dress(axes: Any, title: str, x: str, y: str) -> None:
    """What all charts look like."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def rendered(figure: Any) -> bytes:
    """The figure as a PNG file's content."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)  # untyped methods
    canvas.print_png(file)
    return file.getvalue()
