"""The page to try a model, used as a person does, in a browser; and what its parts refuse."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mshnet import ModelConfig, MSHNet
from mshnet.checkpoint import save_model
from mshnet.data.drawing import draw_scene
from mshnet.errors import InputError
from mshnet.predict import Segmenter, SupportSet
from tests.cluster import browsing
from tests.object_store import free_port

pytest.importorskip("gradio", reason="no gradio here: pip install 'mshnet[page]'")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
ORIENTATION = 0x0112
LOOK_S = 180.0
"""On a loaded machine whose browser draws without a GPU."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; MSHNET_PAGE_MODEL names a trained one, for pictures of the page."""
    if given := os.environ.get("MSHNET_PAGE_MODEL"):
        return Path(given)
    folder = tmp_path_factory.mktemp("model")
    save_model(MSHNet(ModelConfig(backbone="resnet18")), str(folder), {"image_size_px": 65})
    return folder


@dataclass(frozen=True)
class Pictures:
    """Generated files: two examples of a class with a mask of the second, and a folder of queries."""

    first: Path
    second: Path
    second_mask: Path
    queries: Path
    object_px: tuple[int, int, int, int]
    """Of the first: left, top, right, bottom of the object."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "queries").mkdir()
    drawn = [draw_scene(np.random.default_rng((7, 18, i)), [18], 256) for i in (0, 2, 3, 5)]
    names = ("first.png", "second.jpg", "queries/ä b.png", "queries/c.jpg")
    for name, (pixels, _) in zip(names, drawn, strict=True):
        Image.fromarray(pixels).save(folder / name)
    # As a camera that was held upright stores it: lying, with a note to turn it by 90°.
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    lying = Image.fromarray(drawn[1][0]).transpose(Image.Transpose.ROTATE_90)
    lying.save(folder / names[1], exif=turned, quality=95)
    Image.fromarray(drawn[1][1][0].visible.astype(np.uint8) * 255).save(folder / "mask.png")
    ys, xs = np.nonzero(drawn[0][1][0].visible)
    box = (int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max()))
    return Pictures(folder / names[0], folder / names[1], folder / "mask.png", folder / "queries", box)


@pytest.fixture(scope="module")
def address(model: Path, pictures: Pictures) -> Iterator[str]:
    """A page that runs as the command starts it."""
    port = free_port()
    flags = ["--model", str(model), "--pictures", str(pictures.queries), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mshnet", "page", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("page: "):
                break
        assert said, "it ended without a word"
        assert said[-1] == f"page: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n", "".join(said)[-3000:]
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=LOOK_S)
        assert (process.returncode, out) == (0, "")
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if missing := browsing.absent():
        pytest.skip(missing)
    with browsing.browser(tmp_path_factory.mktemp("browser")) as driver:
        # More is loaded than the browser would remember.
        script = {"source": "performance.setResourceTimingBufferSize(5000)"}
        driver.set_window_size(1500, 1420)
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
        yield driver


def until(driver: Any, what: str, look: Callable[[], Any]) -> Any:
    """What `look` gives, once it gives something."""
    from selenium.common.exceptions import WebDriverException

    deadline = time.monotonic() + LOOK_S
    while time.monotonic() < deadline:
        try:
            if found := look():
                return found
        except (WebDriverException, IndexError, ValueError):  # not there yet, or drawn anew meanwhile
            pass
        time.sleep(0.1)
    browsing.picture(driver, "not-seen")
    raise AssertionError(f"not seen: {what}; the page says:\n{text(driver)[:3000]}")


def css(driver: Any, selector: str) -> list[Any]:
    from selenium.webdriver.common.by import By

    return list(driver.find_elements(By.CSS_SELECTOR, selector))


def text(driver: Any) -> str:
    return str(css(driver, "body")[0].text)


def click(driver: Any, selector: str, wording: str = "") -> None:
    def press() -> bool:
        (found, *_) = [e for e in css(driver, selector) if wording in e.text]
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()
        return True

    until(driver, f"{selector} {wording}", press)


def upload(driver: Any, selector: str, file: Path) -> None:
    def give() -> bool:
        css(driver, f"{selector} input[type=file]")[0].send_keys(str(file))
        return True

    until(driver, selector, give)


def edit(driver: Any, file: Path) -> None:
    """Put a picture into the empty editor."""
    until(driver, "an empty editor", lambda: is_empty(driver))
    upload(driver, "#editor", file)
    until(driver, "the picture in the editor", lambda: not is_empty(driver))


def is_empty(driver: Any) -> bool:
    return "Upload an image" in css(driver, "#editor")[0].text


def draw(driver: Any, size: tuple[int, int], points: list[tuple[int, int]]) -> None:
    """A stroke through points of a picture of that width and height, as the editor shows it."""
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = until(driver, "the editor's canvas", lambda: css(driver, "#editor canvas"))[0]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    scale = until(driver, "the scale", lambda: zoom(driver))
    chain = ActionChains(driver, duration=30)
    places = [(round((x - size[0] / 2) * scale), round((y - size[1] / 2) * scale)) for x, y in points]
    chain.move_to_element_with_offset(canvas, *places[0]).click_and_hold()
    for place in places[1:]:
        chain.move_to_element_with_offset(canvas, *place)
    chain.release().perform()


def zoom(driver: Any) -> float:
    """Of the editor, as it says itself."""
    shown = [e.text for e in css(driver, "#editor *") if e.text.endswith("%")]
    return float(shown[-1].rstrip("%")) / 100 if shown else 0.0


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=LOOK_S) as answer:
        return bytes(answer.read())


def test_a_class_is_learnt_from_a_box_and_a_mask_and_found(
    driver: Any, address: str, model: Path, pictures: Pictures, tmp_path: Path
) -> None:
    driver.get(address)
    edit(driver, pictures.first)
    size = Image.open(pictures.first).size
    click(driver, "#reading label", "box")
    x0, y0, x1, y1 = pictures.object_px
    draw(driver, size, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    browsing.picture(driver, "page-drawn")
    click(driver, "#add")
    until(driver, "an example", lambda: len(css(driver, "#examples img")) == 1)

    edit(driver, pictures.second)
    upload(driver, "#mask-file", pictures.second_mask)
    until(driver, "the mask's size", lambda: "⇣" in css(driver, "#mask-file")[0].text)
    click(driver, "#add")
    until(driver, "two examples", lambda: len(css(driver, "#examples img")) == 2)
    until(driver, "an empty editor", lambda: is_empty(driver))

    if os.environ.get(browsing.SCREENSHOTS):  # as it looks while one works
        edit(driver, pictures.first)
        draw(driver, size, [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)])
    query = pictures.queries / "ä b.png"
    upload(driver, "#query", query)
    click(driver, "#segment")
    until(driver, "the result", lambda: css(driver, "#result img"))
    until(driver, "what was found", lambda: "highest probability" in text(driver))
    driver.execute_script("window.scrollTo(0, 0)")
    browsing.picture(driver, "page")

    (learned,) = until(driver, "the class", lambda: css(driver, "#files a[href$=safetensors]"))
    (tmp_path / "class.safetensors").write_bytes(fetched(learned.get_attribute("href")))
    support = SupportSet.load(tmp_path / "class.safetensors")
    assert (support.name, len(support)) == ("object", 2)
    scale = support.image_size_px / np.array(size)
    rows, columns = np.nonzero(support.masks[0].numpy())
    # The brush is 3 px wide at this size.
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    np.testing.assert_allclose(
        found, np.array([x0, y0, x1, y1]) * [*scale, *scale], atol=4
    )  # the brush is 3 px wide there
    assert support.masks[0].sum() == (found[2] - found[0]) * (found[3] - found[1])

    side = (support.image_size_px, support.image_size_px)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(pictures.second)).resize(side), dtype=float)
    assert np.abs(support.images[1].permute(1, 2, 0).numpy() - upright).mean() < 8

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the page: sums are rounded in another order on more
    segmenter = Segmenter.from_checkpoint(model, device="cpu")
    segmenter.add(support)
    expected = segmenter(query).mask * np.uint8(255)
    torch.set_num_threads(threads)
    (link,) = css(driver, "#files a[href$='mask.png']")
    mask = np.array(Image.open(io.BytesIO(fetched(link.get_attribute("href")))))
    np.testing.assert_array_equal(mask, expected)

    elsewhere = [url for url in requested(driver) if not url.startswith((address, "data:", "blob:"))]
    assert len(requested(driver)) > 20
    assert elsewhere == []


def requested(driver: Any) -> list[str]:
    """What this page has loaded, or tried to."""
    return list(driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)"))


def test_what_is_missing_is_said_on_the_page(driver: Any, address: str) -> None:
    driver.get(address)
    click(driver, "#segment")
    until(driver, "what is missing", lambda: "expected a picture to segment, found none" in text(driver))
    click(driver, "#add")
    until(driver, "what is missing", lambda: "expected a picture to draw on, found none" in text(driver))


# Its parts, without a browser ---------------------------------------------------------------------------


def drawing(picture: Image.Image, *boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    """What the editor gives: a picture, and a layer with filled boxes."""
    layer = Image.new("RGBA", picture.size)
    for box in boxes:
        layer.paste((255, 45, 85, 255), box)
    return {"background": picture.convert("RGBA"), "layers": [layer], "composite": None}


def test_an_example_is_what_was_drawn_and_no_larger_than_needed(tmp_path: Path) -> None:
    from mshnet.page import EXAMPLE_PX, marked

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    example = marked(" scratch ", drawing(picture, (5, 6, 15, 16)), "paint", None)
    expected = np.zeros((30, 40), dtype=bool)
    expected[6:16, 5:15] = True
    assert example.name == "scratch"
    np.testing.assert_array_equal(example.image, np.asarray(picture))
    np.testing.assert_array_equal(example.mask, expected)

    Image.fromarray(~expected).save(tmp_path / "mask.png")
    from_file = marked("scratch", drawing(picture, (5, 6, 15, 16)), "paint", str(tmp_path / "mask.png"))
    np.testing.assert_array_equal(from_file.mask, ~expected)

    wide = Image.new("RGB", (2 * EXAMPLE_PX, EXAMPLE_PX))
    large = marked("x", drawing(wide, (0, 0, EXAMPLE_PX, EXAMPLE_PX)), "paint", None)
    assert large.image.shape == (EXAMPLE_PX // 2, EXAMPLE_PX, 3)
    assert large.mask.mean() == pytest.approx(0.5)


def test_what_is_no_example_is_refused(tmp_path: Path) -> None:
    from mshnet.page import MOST_CLASSES, MOST_EXAMPLES, marked, with_example

    picture = Image.new("RGB", (40, 30))
    Image.new("L", (30, 40), 255).save(tmp_path / "turned.png")
    Image.new("L", (40, 30)).save(tmp_path / "empty.png")
    for arguments, message in (
        ((" ", drawing(picture), "paint", None), "expected a name for the class"),
        (("x", None, "paint", None), "expected a picture to draw on"),
        (("x", drawing(picture), "paint", None), "expected strokes on the picture"),
        (("x", drawing(picture), "paint", str(tmp_path / "turned.png")), "40×30, found 30×40"),
        (("x", drawing(picture), "paint", str(tmp_path / "empty.png")), "expected an object in the mask"),
    ):
        with pytest.raises(InputError, match=message):
            marked(*arguments)
    one = marked("x", drawing(picture, (1, 1, 9, 9)), "paint", None)
    examples = [one] * MOST_EXAMPLES
    with pytest.raises(InputError, match=f"at most {MOST_EXAMPLES} examples of 'x'"):
        with_example(examples, one)
    many = [replace(one, name=str(i)) for i in range(MOST_CLASSES)]
    with pytest.raises(InputError, match=f"at most {MOST_CLASSES} classes"):
        with_example(many, one)
    assert len(with_example(many, many[0])) == MOST_CLASSES + 1


def test_a_visitors_classes_are_forgotten_and_those_before_stay(model: Path, pictures: Pictures) -> None:
    from mshnet.page import Example, Model

    image = np.asarray(ImageOps.exif_transpose(Image.open(pictures.second)))
    mask = np.asarray(Image.open(pictures.second_mask)) > 0
    segmenter = Segmenter.from_checkpoint(model, device="cpu")
    with pytest.raises(InputError, match="expected an example, found none"):
        Model(segmenter).segment([], image)
    segmenter.learn("before", [image], [mask])
    page = Model(segmenter)
    segmented, learned = page.segment([Example("mine", image, mask)], image)
    assert (segmented.classes, [s.name for s in learned]) == (("mine", "before"), ["mine"])
    assert segmenter.classes == ("before",)
    with pytest.raises(InputError, match="before is learnt already"):
        page.segment([Example("before", image, mask)], image)


def test_markup_in_a_name_is_text() -> None:
    from mshnet.page import _escaped

    assert _escaped("<b>*x*</b>") == "&#60;b&#62;&#42;x&#42;&#60;&#47;b&#62;"


def test_the_command_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mshnet.commands import page

    with pytest.raises(InputError, match="expected pictures in"):
        page.command(model="m", pictures=str(tmp_path))
    with pytest.raises(InputError, match=r"port must be 1\.\.65535, got 0"):
        page.command(model="m", port=0)
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mshnet\[page\]'"):
        page.command(model="m")
