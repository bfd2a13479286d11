"""Colours, sizes and text that all pictures share."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

# Okabe and Ito's colours: told apart with any colour vision, and in grey by lightness.
SUPPORT_RGB, TRUTH_RGB, PREDICTION_RGB = (0, 158, 115), (0, 114, 178), (213, 94, 0)
FOLD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SERIES_COLOURS: Mapping[str, str] = {
    "trained": "#0072B2", "prototype": "#E69F00", "untrained": "#999999", "foreground": "#CCCCCC",
}  # fmt: skip
TILE_PX = 240
GAP_PX = 8
TEXT_PX = 32
"""Height of a line of text."""
HEADING, CAPTION, NOTE = 22, 19, 17
"""Sizes of text in pixels: still read where a page shows a row of tiles at half its width."""
INK, SOFT, PAPER, FRAME = (34, 34, 34), (105, 105, 105), (255, 255, 255), (200, 200, 200)


def font(size_px: int) -> Any:
    """Pillow's own: the same on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size=size_px)


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file's content."""
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()
