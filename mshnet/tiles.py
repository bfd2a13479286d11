"""A large picture looked at in overlapping windows, whose logits are blended."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mshnet.errors import InputError

MOST_OVERLAP = 0.75
"""Of a window's side; every pixel is then looked at some 16 times."""
Window = tuple[slice, slice]
"""Rows and columns."""


def check_tiles(tile_px: int, overlap: float) -> None:
    """Raise InputError for windows that make no sense."""
    if tile_px and tile_px < 33:
        raise InputError(f"tile_px must be 33 or more, or 0 for the whole picture, got {tile_px}")
    if not 0 <= overlap <= MOST_OVERLAP:
        raise InputError(f"overlap must be 0..{MOST_OVERLAP}, got {overlap}")


def windows(height: int, width: int, tile_px: int, overlap: float) -> list[Window]:
    """Windows of tile_px × tile_px pixels, evenly spread, that overlap by that share of a side at least.

    One that covers a side that is not longer than tile_px; with tile_px 0 the whole picture.
    """
    rows, columns = (_spread(size, tile_px or size, overlap) for size in (height, width))
    return [(row, column) for row in rows for column in columns]


def _spread(size: int, tile: int, overlap: float) -> list[slice]:
    if size <= tile:
        return [slice(0, size)]
    step = max(1, math.floor(tile * (1 - overlap)))
    count = math.ceil((size - tile) / step) + 1
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [slice(start, start + tile) for start in starts]


class Blend:
    """The weighted mean of what windows give for n classes; together they must cover the picture."""

    def __init__(self, classes: int, height: int, width: int, device: torch.device) -> None:
        self._total = torch.zeros(classes, height, width, device=device)
        self._weight: Tensor | None = None

    def add(self, number: int, window: Window, values: Float[Tensor, "h w"]) -> None:
        """A window's values for one class. They count most in its middle, least at its border, where least is seen.

        One that is the whole picture is taken as it is.
        """
        rows, columns = window
        if values.shape == self._total.shape[1:]:
            self._total[number] = values
            return
        if self._weight is None:
            self._weight = torch.zeros_like(self._total)
        weight = _hat(values.shape[0], values)[:, None] * _hat(values.shape[1], values)
        self._total[number, rows, columns] += values * weight
        self._weight[number, rows, columns] += weight

    def mean(self) -> Float[Tensor, "n H W"]:
        """Of the picture."""
        return self._total if self._weight is None else self._total / self._weight


def _hat(size: int, like: Tensor) -> Float[Tensor, " size"]:
    """Rises to the middle and falls: 1, 2, ..., 2, 1, divided by the largest."""
    place = torch.arange(1, size + 1, dtype=like.dtype, device=like.device)
    hat = torch.minimum(place, place.flip(0))
    return hat / hat.max()
