"""The data report's charts and examples: what they show, and names that would break them."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from mshnet.data.survey_facts import SurveyedImage
from mshnet.errors import InputError
from mshnet.visualize.style import TILE_PX
from mshnet.visualize.survey_charts import ClassBar, class_chart, plain, size_chart, together_chart
from mshnet.visualize.survey_pictures import Example, example_strip, typical


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def bar(name: str, images: int = 5, share: tuple[float, float, float] | None = (0.1, 0.2, 0.3)) -> ClassBar:
    return ClassBar(name=name, images=images, large_enough=images // 2, share=share, fold=images % 3)


def test_any_names_can_be_drawn_and_nothing_is_warned_of() -> None:
    names = ["$x^2$ and $", "屋根", "a" * 200, "two\nlines", "", "_{", "крыша"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        class_chart([*(bar(name) for name in names), bar("nothing", 0, None)], 0.001)
        together_chart(names, np.full((7, 7), 3))
    assert plain("屋根 and крыша") == "□□ and крыша"
    assert plain("two\nlines") == "two lines"
    assert len(plain("a" * 200)) == 26
    assert plain("$1") == r"\$1"


def test_a_row_more_makes_the_chart_higher() -> None:
    few, many = (opened(class_chart([bar(f"class {i}", i + 1) for i in range(n)], 0.001)) for n in (3, 30))
    assert many.height > 2 * few.height
    assert many.width == few.width


def test_sizes_and_shares_of_any_range_are_drawn() -> None:
    opened(size_chart({(100, 20): 3, (4000, 6000): 1}, 473))
    opened(class_chart([bar("tiny", share=(1e-9, 1e-7, 1.0))], 0.9))
    opened(together_chart(("a", "b"), np.array([[0, 0], [0, 0]])))
    for draw in (lambda: class_chart([], 0.1), lambda: size_chart({}, 473), lambda: example_strip([])):
        with pytest.raises(InputError, match="at least one"):
            draw()
    with pytest.raises(InputError, match="two classes or more"):
        together_chart(("a",), np.array([[1]]))


def test_examples_are_a_small_a_median_and_a_large_object() -> None:
    images = [
        SurveyedImage(image_id=f"{n:02d}", subset="train", height=10, width=100, pixels={4: 10 * n})
        for n in range(1, 22)
    ]
    assert [image.pixels[4] for image in typical(images, 4, min_object_px=1)] == [30, 110, 190]
    assert [image.pixels[4] for image in typical(images, 4, min_object_px=205)] == [210]
    # Where none is large enough, those that there are.
    assert len(typical(images, 4, min_object_px=10**6)) == 3
    assert typical(images, 5, min_object_px=1) == []


def test_a_strip_shows_each_mask_on_its_picture() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[10:30, 10:30] = True
    grey = np.full((40, 40, 3), 100, dtype=np.uint8)
    here, there = (Example(image=grey, mask=where, caption="") for where in (mask, ~mask))
    strip = np.asarray(example_strip([here, there]))
    middle, left = TILE_PX // 2, strip.shape[1] - TILE_PX
    assert tuple(strip[15, 15]) == (100, 100, 100)
    assert strip[middle, middle, 0] > 130
    assert tuple(strip[middle, left + middle]) == (100, 100, 100)
    assert strip[15, left + 15, 0] > 130
