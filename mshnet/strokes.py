"""What a person drew on a picture, as a mask: an outline, a painted area, or boxes."""

from __future__ import annotations

from math import ceil
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Integer

from mshnet.errors import InputError

Reading = Literal["outline", "paint", "box"]
READINGS: tuple[Reading, ...] = get_args(Reading)
GAP = 0.02
"""Of the picture's longer side: how far apart an outline's ends may lie."""


def mask_from_strokes(strokes: Bool[np.ndarray, "H W"], reading: Reading) -> Bool[np.ndarray, "H W"]:
    """Where the object is, by one of three rules.

    - `paint`: the painted pixels, no others.
    - `outline`: these, and what they enclose. Gaps of up to `GAP` count as closed. An outline may end at the
      picture's border: of the parts that it makes of the picture there, the largest is the background.
    - `box`: of each stroke that touches no other, the upright rectangle around it.

    Raises InputError where nothing is drawn.
    """
    if not strokes.any():
        raise InputError("expected strokes on the picture, found none; draw on it, or give a mask")
    if reading == "paint":
        return strokes.copy()
    if reading == "box":
        return _boxes(strokes)
    return _filled(strokes)


def _boxes(strokes: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    from scipy import ndimage

    touching = np.ones((3, 3), dtype=bool)
    parts, _ = ndimage.label(strokes, structure=touching)
    mask = np.zeros_like(strokes)
    for box in ndimage.find_objects(parts):
        mask[box] = True
    return mask


def _filled(strokes: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    from scipy import ndimage

    # Strokes made thick close the gaps; what lies between is then given back to the region that is nearest.
    walls = ndimage.distance_transform_edt(~strokes) <= ceil(GAP * max(strokes.shape) / 2)
    regions, count = ndimage.label(~walls)
    if not count:
        return strokes.copy()
    inside = (regions != _outside(regions)) & ~walls
    nearest = ndimage.distance_transform_edt(walls, return_distances=False, return_indices=True)
    return np.asarray(strokes | inside[tuple(nearest)])


def _outside(regions: Integer[np.ndarray, "H W"]) -> int:
    """The background: the largest of the regions that lie at the border; 0, none, where strokes run all along it."""
    border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    candidates = np.setdiff1d(border, [0])
    if not len(candidates):
        return 0
    return int(candidates[np.argmax(np.bincount(regions.ravel())[candidates])])
