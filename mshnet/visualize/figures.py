"""Panels already drawn, put together as a paper shows them: rows of episodes, one column of rows per setting."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mshnet.errors import InputError
from mshnet.visualize.style import GAP_PX, HEADING, INK, PAPER, TEXT_PX, font, png_bytes

if TYPE_CHECKING:
    from PIL import Image


def episode_figure(columns: Mapping[str, Sequence[bytes]]) -> bytes:
    """PNG: the panels (PNG files of `episode_panel`) of each column below each other, its name on top.

    As the paper's figure of results: {"5-shot": rows, "1-shot": rows}. A column may have fewer rows than another.
    """
    from PIL import Image, ImageDraw

    opened = {name: [_opened(panel) for panel in panels] for name, panels in columns.items()}
    if not any(opened.values()):
        raise InputError("expected at least one panel to put into a figure, got none")
    widths = {name: max((panel.width for panel in panels), default=0) for name, panels in opened.items()}
    heights = [sum(panel.height for panel in panels) for panels in opened.values()]
    gaps = 4 * GAP_PX * (len(opened) - 1)
    figure = Image.new("RGB", (sum(widths.values()) + gaps, TEXT_PX + GAP_PX + max(heights)), PAPER)
    draw = ImageDraw.Draw(figure)
    left = 0
    for name, panels in opened.items():
        draw.text((left + widths[name] // 2, GAP_PX), name, fill=INK, font=font(HEADING), anchor="ma")
        top = TEXT_PX + GAP_PX
        for panel in panels:
            figure.paste(panel, (left, top))
            top += panel.height
        left += widths[name] + 4 * GAP_PX
    return png_bytes(figure)


def _opened(panel: bytes) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(panel)).convert("RGB")
