"""Example objects of a class with their masks, as one strip of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, UInt8

from mshnet.data.survey_facts import SurveyedImage
from mshnet.errors import InputError
from mshnet.visualize.panels import framed
from mshnet.visualize.style import CAPTION, GAP_PX, INK, PAPER, PREDICTION_RGB, TEXT_PX, TILE_PX, font

if TYPE_CHECKING:
    from PIL import Image

TYPICAL = (0.1, 0.5, 0.9)
"""Where the examples lie among a class's objects by size: small, median, large."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An object to draw."""

    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]
    caption: str


def typical(images: Sequence[SurveyedImage], class_id: int, min_object_px: int) -> list[SurveyedImage]:
    """A small, a median and a large object's images, each once; of those large enough, else of all."""
    shown = [image for image in images if image.pixels.get(class_id)]
    usable = [image for image in shown if image.pixels[class_id] >= min_object_px] or shown
    ordered = sorted(usable, key=lambda image: (image.share(class_id), image.image_id))
    places = dict.fromkeys(round(place * (len(ordered) - 1)) for place in TYPICAL) if ordered else {}
    return [ordered[place] for place in places]


def example_strip(examples: Sequence[Example]) -> Image.Image:
    """The examples side by side, each with its mask and what it is below."""
    from PIL import Image, ImageDraw

    if not examples:
        raise InputError("expected at least one example to draw, got none")
    width = len(examples) * (TILE_PX + GAP_PX) - GAP_PX
    strip = Image.new("RGB", (width, TILE_PX + TEXT_PX), PAPER)
    draw = ImageDraw.Draw(strip)
    for place, example in enumerate(examples):
        left = place * (TILE_PX + GAP_PX)
        strip.paste(framed(example.image, example.mask, PREDICTION_RGB), (left, 0))
        draw.text((left + TILE_PX // 2, TILE_PX + 5), example.caption, fill=INK, font=font(CAPTION), anchor="ma")
    return strip
