"""Charts of what a data set holds, as PNG files: classes, sizes of objects and pictures, classes seen together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Int64

from mshnet.errors import InputError
from mshnet.visualize.charts import dress, figure_of, rendered
from mshnet.visualize.style import FOLD_COLOURS

LONGEST_NAME = 26
LACKING = "□"
GREY = "#9aa0a6"


@dataclass(frozen=True, kw_only=True)
class ClassBar:
    """A row of `class_chart`."""

    name: str
    images: int
    large_enough: int
    """Of the images; the others are drawn pale."""
    share: tuple[float, float, float] | None
    """Of a picture that an object covers, 0 to 1: percentiles 10, 50, 90."""
    fold: int | None
    """That tests it; None: no fold."""


def class_chart(rows: Sequence[ClassBar], limit: float) -> bytes:
    """PNG: images of each class on the left, the sizes of its objects on the right, the first row on top.

    Colours are those of the folds that test a class. `limit` (share of a picture, 0 to 1) is drawn as a line.
    """
    if not rows:
        raise InputError("expected at least one class to draw, got none")
    figure = figure_of(width=9.6, height=1.1 + 0.21 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.1, 1.0))
    places = range(len(rows))
    colours = [_colour(row.fold) for row in rows]
    left.barh(places, [row.images for row in rows], height=0.7, color=colours, alpha=0.3)
    left.barh(places, [row.large_enough for row in rows], height=0.7, color=colours)
    for place, row in zip(places, rows, strict=True):
        text = f"{row.large_enough:,}" if row.large_enough == row.images else f"{row.large_enough:,} of {row.images:,}"
        left.annotate(text, (row.images, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        if row.share is not None:
            low, median, high = (100 * value for value in row.share)
            right.plot([low, high], [place, place], color=colours[place], linewidth=2.4, solid_capstyle="butt")
            right.plot(median, place, marker="o", markersize=4.5, color=colours[place])
    left.set_yticks(places, [plain(row.name) for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.margins(x=0.16)
    right.set_xscale("log")
    right.set_xlim(_decade_below(min([limit, *(row.share[0] for row in rows if row.share)])), 110)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    right.xaxis.set_minor_formatter("")
    right.axvline(100 * limit, color=GREY, linewidth=1, linestyle="--")
    dress(left, "images that show the class", "images", "")
    dress(right, "of a picture that its objects cover", "", "")
    left.grid(visible=False, axis="y")
    folds = sorted({row.fold for row in rows if row.fold is not None})
    if len(folds) > 1:
        from matplotlib.patches import Patch

        handles = [Patch(color=_colour(fold), label=f"tested in fold {fold}") for fold in folds]
        figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower left", ncols=min(6, len(folds)))
    return rendered(figure)


def size_chart(sizes: Mapping[tuple[int, int], int], side_px: int) -> bytes:
    """PNG: a dot for each (height, width) of pictures, as large as there are many; the training size as a square."""
    if not sizes:
        raise InputError("expected at least one picture's size to draw, got none")
    figure = figure_of(width=4.6, height=4.0)
    axes = figure.subplots()
    most = max(sizes.values())
    widths, heights = [width for _, width in sizes], [height for height, _ in sizes]
    areas = [14 + 240 * count / most for count in sizes.values()]
    axes.scatter(widths, heights, s=areas, color=FOLD_COLOURS[0], alpha=0.45, linewidths=0)
    axes.plot([0, side_px, side_px], [side_px, side_px, 0], color=FOLD_COLOURS[1], linewidth=1.2)
    axes.annotate(f"training size, {side_px} px", (0, side_px), (3, 3), textcoords="offset points", fontsize=8,
                  color=FOLD_COLOURS[1])  # fmt: skip
    limit = 1.08 * max([*widths, *heights, side_px])
    axes.set_xlim(0, limit)
    axes.set_ylim(0, limit)
    axes.set_aspect("equal")
    dress(axes, "sizes of the pictures", "width, px", "height, px")
    return rendered(figure)


def together_chart(names: Sequence[str], together: Int64[np.ndarray, "c c"]) -> bytes:
    """PNG: of the images that show a row's class, the share that shows a column's class too."""
    if len(names) < 2:
        raise InputError(f"expected two classes or more to draw together, got {len(names)}")
    own = np.maximum(np.diag(together), 1)
    share = together / own[:, None]
    np.fill_diagonal(share, np.nan)
    side = 2.1 + 0.24 * len(names)
    figure = figure_of(width=side + 0.8, height=side)
    axes = figure.subplots()
    drawn = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=max(10.0, 100 * float(np.nanmax(share))))
    axes.set_xticks(range(len(names)), [plain(name) for name in names], rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8)
    if len(names) <= 12:
        for row, column in np.argwhere(together > 0):
            if row != column:
                dark = share[row, column] > 0.6 * float(np.nanmax(share))
                axes.text(column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
    axes.set_title("seen together", fontsize=10, loc="left")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7, format=lambda value, _: f"{value:.0f} %")
    bar.ax.tick_params(labelsize=8)
    return rendered(figure)


def plain(name: str) -> str:
    """A name as a chart takes it: short, on one line, no formula; a box for a character that the font lacks."""
    short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    known = _known_characters()
    drawn = "".join(c if ord(c) in known else LACKING for c in " ".join(short.split()))
    return drawn.replace("$", r"\$")


@cache
def _known_characters() -> frozenset[int]:
    """Of the font that matplotlib draws with: of each other character it would warn."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _decade_below(share: float) -> float:
    """In %: from there to 100 % it is two powers of ten or more, so that the axis has labels."""
    return min(1.0, 10.0 ** math.floor(math.log10(max(100 * share, 1e-4))))


def _colour(fold: int | None) -> str:
    return GREY if fold is None else FOLD_COLOURS[fold % len(FOLD_COLOURS)]
