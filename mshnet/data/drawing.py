"""Textured objects on textured ground: the pictures of the generated data set.

A class is a shape with a texture (pattern, period, orientation); colours are drawn per object, so that
colour alone never tells a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

SHAPES = ("disc", "square", "triangle", "star", "cross", "crescent", "heart", "arrow", "flower", "capsule")
TEXTURES = (
    "striped", "checked", "dotted", "ringed", "wavy", "zigzag", "brick", "rayed", "gridded", "blotched",
)  # fmt: skip
GRAINS = ("fine", "coarse")

FINE_PERIOD, COARSE_PERIOD = 0.055, 0.12
"""Of the longer side: 7 and 15 px at 128 px, a period or more per cell of the level-3 feature grid."""
DARK, LIGHT, SATURATION = (0.05, 0.2), (0.8, 0.95), 0.9
"""Luminances of an object's two colours, and how colourful they are. With these, the nearest
masked layer2 feature of an untrained ResNet-18 is of the same class for 38 and 32 % of the objects (two seeds;
26 and 21 % with luminances 0.08-0.3 and 0.7-0.95 in full colour; chance 5 %)."""
MIN_VISIBLE = 0.45
"""Share of an earlier object that a later one must leave in sight."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What makes a class: indices into SHAPES and TEXTURES, and the grain of the texture."""

    shape: int
    texture: int
    coarse: bool

    @property
    def name(self) -> str:
        """Such as `fine striped disc`."""
        return f"{GRAINS[self.coarse]} {TEXTURES[self.texture]} {SHAPES[self.shape]}"


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One drawn object."""

    class_id: int
    outline: Float[np.ndarray, "N 2"]
    """x, y in pixels; may leave the picture."""
    visible: Bool[np.ndarray, "H W"]
    occluded: bool
    """Whether a later object hides a part of it."""
    crowd: bool = False


def look_of(class_id: int) -> Look:
    """The look of class 0..79; no two of them are the same."""
    # The step of 3 gives the ten shapes to other textures in each group of ten classes.
    return Look(shape=(class_id + 3 * (class_id // 10)) % 10, texture=class_id % 10, coarse=class_id // 10 % 2 == 1)


def draw_scene(
    rng: np.random.Generator, classes: list[int], size_px: int, crowd_class: int | None = None
) -> tuple[UInt8[np.ndarray, "H W 3"], list[Placed]]:
    """One picture, longer side `size_px`, with an object of each class in `classes`, later ones in front.

    With `crowd_class`, a cluster of tiny objects of that class comes first and is returned as one crowd.
    """
    width, height = _canvas_size(rng, size_px)
    picture = _ground(rng, height, width)
    placed: list[Placed] = []
    if crowd_class is not None:
        placed.append(_draw_crowd(rng, picture, crowd_class))
    for i, class_id in enumerate(classes):
        share = _area_share(rng, first=i == 0, crowded=len(classes) > 2)
        for attempt in range(12):
            # Harder to place with each try, so smaller: every class asked for ends up in the picture.
            outline = _outline(rng, look_of(class_id), (height, width), share * 0.85**attempt)
            mask = _fill(outline, height, width)
            if all((p.visible & ~mask).sum() >= MIN_VISIBLE * p.visible.sum() for p in placed):
                break
        else:
            continue
        _paint(rng, picture, mask, outline, look_of(class_id))
        placed = [_behind(p, mask) for p in placed]
        placed.append(Placed(class_id=class_id, outline=outline, visible=mask, occluded=False))
    noisy = picture + rng.normal(0, 0.012, picture.shape)
    return (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8), placed


def _canvas_size(rng: np.random.Generator, size_px: int) -> tuple[int, int]:
    short = round(size_px * 0.8)
    return [(size_px, size_px), (size_px, size_px), (size_px, short), (short, size_px)][rng.integers(4)]


def _area_share(rng: np.random.Generator, *, first: bool, crowded: bool) -> float:
    """Share of the picture that an object covers: mostly 6 to 28 %, every fourth further one 1.5 to 5 %."""
    if not first and rng.random() < 0.25:
        return float(rng.uniform(0.015, 0.05))
    return float(rng.uniform(0.06, 0.16) if crowded else rng.uniform(0.09, 0.28))


def _behind(earlier: Placed, mask: Bool[np.ndarray, "H W"]) -> Placed:
    hidden = bool((earlier.visible & mask).any())
    return Placed(
        class_id=earlier.class_id,
        outline=earlier.outline,
        visible=earlier.visible & ~mask,
        occluded=earlier.occluded or hidden,
        crowd=earlier.crowd,
    )


def _draw_crowd(rng: np.random.Generator, picture: Float[np.ndarray, "H W 3"], class_id: int) -> Placed:
    height, width = picture.shape[:2]
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    whole = np.zeros((height, width), dtype=bool)
    for _ in range(int(rng.integers(5, 9))):
        outline = _outline(rng, look_of(class_id), (height, width), 0.012)
        outline = outline - outline.mean(0) + middle + rng.normal(0, 0.1, 2) * (width, height)
        mask = _fill(outline, height, width)
        _paint(rng, picture, mask, outline, look_of(class_id))
        whole |= mask
    return Placed(class_id=class_id, outline=np.zeros((0, 2)), visible=whole, occluded=True, crowd=True)


def _outline(rng: np.random.Generator, look: Look, size: tuple[int, int], share: float) -> Float[np.ndarray, "N 2"]:
    """The shape at a drawn place, tilted by at most 20°, covering `share` of a picture (height, width)."""
    height, width = size
    points = _unit_shape(SHAPES[look.shape])
    angle = rng.uniform(-pi / 9, pi / 9)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = points @ turn * np.sqrt(share * height * width)
    # At most a fifth of its extent outside on each side, so that it keeps a recognisable shape.
    low, high = points.min(0), points.max(0)
    slack = 0.2 * (high - low)
    first, last = -low - slack, np.array([width, height]) - high + slack
    first, last = np.minimum(first, last), np.maximum(first, last)
    return np.asarray(points + rng.uniform(first, last))


def _unit_shape(name: str) -> Float[np.ndarray, "N 2"]:
    """A polygon of area 1 around its centroid; y points down."""
    t = np.linspace(0, 2 * pi, 48, endpoint=False)
    points: list[tuple[float, float]] | np.ndarray
    match name:
        case "disc":
            points = np.stack([np.cos(t), np.sin(t)], 1)
        case "square":
            points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        case "triangle":
            points = [(0, -1), (1, 0.8), (-1, 0.8)]
        case "star":
            k = np.arange(10)
            radius = np.where(k % 2 == 0, 1.0, 0.5)
            points = np.stack([radius * np.sin(k * pi / 5), -radius * np.cos(k * pi / 5)], 1)
        case "cross":
            points = [(-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1),
                      (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1)]  # fmt: skip
        case "crescent":
            outer, inner = np.linspace(0.2 * pi, 1.8 * pi, 30), np.linspace(1.75 * pi, 0.25 * pi, 24)
            points = np.concatenate([
                np.stack([np.cos(outer), np.sin(outer)], 1),
                np.stack([0.55 + 0.62 * np.cos(inner), 0.62 * np.sin(inner)], 1),
            ])  # fmt: skip
        case "heart":
            x = 16 * np.sin(t) ** 3
            points = np.stack([x, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1)
        case "arrow":
            points = [(-1, -0.4), (0.1, -0.4), (0.1, -0.95), (1, 0), (0.1, 0.95), (0.1, 0.4), (-1, 0.4)]
        case "flower":
            radius = 1 + 0.3 * np.cos(5 * t)
            points = np.stack([radius * np.cos(t), radius * np.sin(t)], 1)
        case _:  # capsule
            shift = np.where(np.cos(t) > 0, 0.9, -0.9)
            points = np.stack([0.75 * np.cos(t) + shift, 0.75 * np.sin(t)], 1)
    p = np.asarray(points, dtype=np.float64)
    x, y = p[:, 0], p[:, 1]
    area = abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) / 2
    return np.asarray((p - p.mean(0)) / np.sqrt(area))


def _fill(outline: Float[np.ndarray, "N 2"], height: int, width: int) -> Bool[np.ndarray, "H W"]:
    canvas = Image.new("1", (width, height))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in outline], fill=1)
    return np.array(canvas, dtype=bool)


def _paint(
    rng: np.random.Generator,
    picture: Float[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "H W"],
    outline: Float[np.ndarray, "N 2"],
    look: Look,
) -> None:
    """Fill the mask with the class's texture in two drawn colours, one dark and one light, softly shaded."""
    rows, columns = np.nonzero(mask)
    x0, y0 = outline.mean(0)
    x, y = columns - x0, rows - y0
    period = max(picture.shape[:2]) * (COARSE_PERIOD if look.coarse else FINE_PERIOD) * rng.uniform(0.88, 1.12)
    # Coarse textures lie diagonally: orientation is part of the class, blurred by a small tilt.
    angle = (pi / 4 if look.coarse else 0.0) + rng.uniform(-pi / 12, pi / 12)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    light_share = 0.5 + 1.6 * _pattern(rng, look, u / period, v / period)
    weight = np.clip(light_share, 0, 1)[:, None]
    dark, light = _colour(rng, *DARK), _colour(rng, *LIGHT)
    tilt = rng.uniform(-0.12, 0.12, 2) / max(mask.shape)
    shade = 1 + x * tilt[0] * 2 + y * tilt[1] * 2
    picture[rows, columns] = (dark * (1 - weight) + light * weight) * shade[:, None]


def _pattern(
    rng: np.random.Generator, look: Look, u: Float[np.ndarray, " N"], v: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """The texture at u, v (in periods, around the object's middle): -1 dark to 1 light."""
    full = 2 * pi
    match TEXTURES[look.texture]:
        case "striped":
            value = np.sin(full * v)
        case "checked":
            value = 2.5 * np.sin(pi * u * 1.2) * np.sin(pi * v * 1.2)
        case "dotted":
            shifted = u + 0.5 * (np.floor(v) % 2)
            value = 3 * (0.33 - np.hypot(shifted % 1 - 0.5, v % 1 - 0.5))
        case "ringed":
            value = np.sin(full * np.hypot(u, v))
        case "wavy":
            value = np.sin(full * (v + 0.35 * np.sin(full * u / 2)))
        case "zigzag":
            value = np.sin(full * (v + 1.2 * np.abs(u / 1.5 % 1 - 0.5)))
        case "brick":
            row = np.floor(v * 1.1)
            gap = np.minimum(_to_line(v * 1.1), _to_line(u * 0.55 + 0.5 * (row % 2)) * 2)
            value = 4 * (0.17 - gap)
        case "rayed":
            value = 2 * np.sin(np.arctan2(v, u) * (5 if look.coarse else 11))
        case "gridded":
            value = 4 * (0.16 - np.minimum(_to_line(u), _to_line(v)))
        case _:  # blotched: a sum of waves in drawn directions
            angles, phases = rng.uniform(0, pi, 7), rng.uniform(0, full, 7)
            across = np.outer(np.cos(angles), u) + np.outer(np.sin(angles), v)
            value = np.sin(full * 0.8 * across + phases[:, None]).sum(0) / 1.6
    return np.asarray(value, dtype=np.float64)


def _to_line(x: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Distance to the nearest whole number."""
    return np.asarray(np.abs(x - np.round(x)))


def _colour(rng: np.random.Generator, low: float, high: float) -> Float[np.ndarray, " rgb"]:
    """A colour of any hue whose luminance lies between low and high."""
    raw = rng.uniform(0, 1, 3)
    luminance = float(raw @ (0.299, 0.587, 0.114))
    raw = luminance + SATURATION * (raw - luminance)
    wanted = rng.uniform(low, high)
    mixed = raw * wanted / luminance if luminance > wanted else 1 - (1 - raw) * (1 - wanted) / (1 - luminance)
    return np.asarray(np.clip(mixed, 0, 1))


def _ground(rng: np.random.Generator, height: int, width: int) -> Float[np.ndarray, "H W 3"]:
    """Cloudy ground of drawn coarseness between two related colours, of lower contrast than the objects."""
    first = _colour(rng, 0.25, 0.7)
    second = np.clip(first + rng.normal(0, 0.16, 3), 0, 1)
    weight = np.zeros((height, width))
    for cells, strength in ((int(rng.integers(2, 6)), 0.6), (int(rng.integers(8, 24)), 0.4)):
        coarse = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
        weight += strength * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    mottled = np.clip(weight, 0, 1)[..., None]
    ground = first * (1 - mottled) + second * mottled
    return np.asarray(ground + rng.normal(0, 0.02, (height, width, 1)))
