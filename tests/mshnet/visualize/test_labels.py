"""Results on their pictures."""

from __future__ import annotations

import numpy as np
import pytest

from mshnet.errors import InputError
from mshnet.visualize.labels import TINT, class_colour, label_overlay


def picture(height: int = 300, width: int = 500) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_class_is_tinted_and_outlined_and_nothing_else_changes() -> None:
    image, labels = picture(), np.zeros((300, 500), dtype=np.uint16)
    labels[100:200, 50:150] = 1
    labels[:60, 420:] = 2  # in the corner
    before = image.copy()
    drawn = np.asarray(label_overlay(image, labels, ["scratch", "dent"], legend=False))
    assert np.array_equal(image, before)
    assert drawn.shape == image.shape
    assert np.array_equal(drawn[labels == 0], image[labels == 0])
    edge = np.zeros((300, 500), dtype=bool)
    edge[100:200, 50:150] = True
    edge[102:198, 52:148] = False
    assert (drawn[edge] == class_colour(0)).all(), "two pixels of outline"
    assert (drawn[102, 52:148] == 255).all(), "a white line within it, seen on any ground"
    inside = (slice(103, 197), slice(53, 147))
    expected = (1 - TINT) * image[inside] + TINT * np.array(class_colour(0))
    assert np.abs(drawn[inside] - expected).max() <= 0.5
    corner = drawn[:57, 423:]
    expected = (1 - TINT) * image[:57, 423:] + TINT * np.array(class_colour(1))
    assert np.abs(corner - expected).max() <= 0.5, "the picture's border is no edge"
    assert (drawn[58:60, 420:] == class_colour(1)).all()


def test_the_outline_grows_with_the_picture() -> None:
    image, labels = np.zeros((2500, 2600, 3), dtype=np.uint8), np.zeros((2500, 2600), dtype=int)
    labels[500:2000, 500:2000] = 1
    drawn = np.asarray(label_overlay(image, labels, ["x"], legend=False))
    full = (drawn == class_colour(0)).all(2)
    edges = [*range(12), *range(1488, 1500)]
    assert full[1000, 500:2000].nonzero()[0].tolist() == edges
    assert full[500:2000, 1000].nonzero()[0].tolist() == edges
    white = (drawn == 255).all(2)
    assert white[1000, 500:2000].nonzero()[0].tolist() == [*range(12, 18), *range(1482, 1488)]


def test_the_legend_is_below_and_names_every_class() -> None:
    image, labels = picture(), np.zeros((300, 500), dtype=int)
    plain = np.asarray(label_overlay(image, labels, ["absent"]))
    assert plain.shape[1:] == (500, 3)
    assert plain.shape[0] > 300
    assert np.array_equal(plain[:300], image)
    strip = plain[300:].reshape(-1, 3)
    assert (strip == class_colour(0)).all(1).sum() >= 100
    names = [f"class number {i}" for i in range(12)]
    many = np.asarray(label_overlay(image, labels, names))
    assert many.shape[0] > plain.shape[0], "as many lines as it takes"
    for index in range(12):
        assert (many[300:].reshape(-1, 3) == class_colour(index)).all(1).sum() >= 100, index
    tiny = label_overlay(picture(3, 2), np.ones((3, 2), dtype=int), ["a name wider than the picture"])
    assert tiny.width == 2


def test_colours_are_told_apart() -> None:
    colours = np.array([class_colour(i) for i in range(40)], dtype=int)
    distances = np.abs(colours[:, None] - colours[None]).sum(2) + 1000 * np.eye(40, dtype=int)
    assert distances.min() > 15
    assert len({tuple(colour) for colour in colours[:7]}) == 7


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"labels of the image's size \(300, 500\), found \(300, 499\)"):
        label_overlay(picture(), np.zeros((300, 499), dtype=int), ["x"])
    with pytest.raises(InputError, match="labels up to 1, one for each class, found 2"):
        label_overlay(picture(), np.full((300, 500), 2), ["x"])
