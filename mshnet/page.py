"""A page to try a model: examples are marked in the browser, a picture is segmented by them. On this machine only.

Nothing on it comes from elsewhere: no fonts, scripts or statistics, so that it works offline and tells nobody.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from mshnet.commands.results import label_picture
from mshnet.data.mask_files import labels as mask_labels
from mshnet.data.picture_files import opened, read_picture
from mshnet.errors import InputError
from mshnet.predict import Segmented, Segmenter, SupportSet
from mshnet.strokes import Reading, mask_from_strokes
from mshnet.visualize.labels import label_overlay

MOST_EXAMPLES = 5
"""Of a class."""
MOST_CLASSES = 6
MOST_BYTES = 50 * 2**20
"""Of an upload."""
EXAMPLE_PX = 1024
"""Longer side to which an example is made smaller: the network sees less than that, and it is kept in memory."""
READINGS: Mapping[str, Reading] = {
    "outline (what it encloses is filled)": "outline",
    "painted area": "paint",
    "box around each stroke": "box",
}
BRUSH, BRUSH_PX = "#ff2d55", 6
GIVEN = "To keep: the mask; the classes, for mshnet segment --learned"
TITLE = "Segment a new class by examples"
STYLE = f"""
footer {{display: none !important}}
#examples .grid-container {{grid-template-columns: repeat({MOST_EXAMPLES}, minmax(0, 1fr)) !important}}
"""


@dataclass(frozen=True)
class Example:
    """A marked picture."""

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    mask: Bool[np.ndarray, "H W"]


def marked(name: str, drawing: Mapping[str, Any] | None, reading: Reading, mask_file: str | None) -> Example:
    """What the editor holds (RGBA `background` and `layers`) as an example of a class; a mask file, if any, wins.

    Raises InputError where name, picture or mark is missing, or the mask is not of the picture's size or shape.
    """
    if not name.strip():
        raise InputError("expected a name for the class, found none; type one, such as scratch")
    background = drawing.get("background") if drawing else None
    if drawing is None or background is None:
        raise InputError("expected a picture to draw on, found none; drop one into the editor")
    image = np.asarray(background.convert("RGB"))
    if mask_file:
        found = Image.fromarray(mask_labels(opened(mask_file), "the mask") != 0)
        if abs(found.width / found.height - background.width / background.height) > 0.02:
            raise InputError(
                f"expected a mask of the picture's shape, {background.width}×{background.height}, found "
                f"{found.width}×{found.height}; give the mask of this picture"
            )
        mask = np.asarray(found.resize(background.size, Image.Resampling.NEAREST))
        if not mask.any():
            raise InputError("expected an object in the mask, found only 0; mark it with any other value")
        return _small(Example(name.strip(), image, mask))
    strokes = np.zeros(image.shape[:2], dtype=bool)
    for layer in drawing.get("layers") or ():
        strokes |= np.asarray(layer.convert("RGBA").resize(background.size, Image.Resampling.NEAREST))[..., 3] > 127
    return _small(Example(name.strip(), image, mask_from_strokes(strokes, reading)))


def _small(example: Example) -> Example:
    height, width = example.mask.shape
    share = EXAMPLE_PX / max(height, width)
    if share >= 1:
        return example
    size = (max(1, round(width * share)), max(1, round(height * share)))
    image = Image.fromarray(example.image).resize(size, Image.Resampling.BILINEAR)
    mask = Image.fromarray(example.mask).resize(size, Image.Resampling.NEAREST)
    return Example(example.name, np.asarray(image), np.asarray(mask))


def with_example(examples: Sequence[Example], new: Example) -> list[Example]:
    """One more. Raises InputError where there are enough of its class, or of classes."""
    names = {example.name for example in examples}
    if sum(example.name == new.name for example in examples) >= MOST_EXAMPLES:
        raise InputError(
            f"expected at most {MOST_EXAMPLES} examples of {new.name!r}; remove one, or learn from more of them with "
            "mshnet learn"
        )
    if new.name not in names and len(names) >= MOST_CLASSES:
        raise InputError(f"expected at most {MOST_CLASSES} classes, found {', '.join(sorted(names))}; remove one")
    return [*examples, new]


class Model:
    """The segmenter as visitors share it: each sees the classes of its own examples, and those learnt before."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self._before = segmenter.classes
        self._lock = threading.Lock()

    @property
    def classes(self) -> tuple[str, ...]:
        """What it had learnt when the page was started."""
        return self._before

    def segment(
        self, examples: Sequence[Example], query: UInt8[np.ndarray, "H W 3"]
    ) -> tuple[Segmented, list[SupportSet]]:
        """The query by the examples' classes, and what was learnt of them. Raises InputError where there are none."""
        by_name: dict[str, list[Example]] = {}
        for example in examples:
            by_name.setdefault(example.name, []).append(example)
        if not by_name and not self._before:
            raise InputError("expected an example, found none; mark the object on a picture and add it")
        if clash := sorted(by_name.keys() & set(self._before)):
            raise InputError(f"{', '.join(clash)} is learnt already; give the examples another name")
        with self._lock:  # the names are this visitor's
            try:
                learned = [
                    self._segmenter.learn(name, [e.image for e in group], [e.mask for e in group])
                    for name, group in by_name.items()
                ]
                return self._segmenter(query, classes=(*by_name, *self._before)), learned
            finally:
                for name in set(by_name) & set(self._segmenter.classes):
                    self._segmenter.forget(name)


def shown(example: Example) -> tuple[Image.Image, str]:
    """The example with its mask, and its name, for the row of examples."""
    return label_overlay(example.image, example.mask.astype(np.int64), (example.name,), legend=False), example.name


def written(segmented: Segmented, learned: Sequence[SupportSet], folder: Path) -> list[str]:
    """Files of the mask (PNG: 0 and 255 for one class, else labels) and of each class that was learnt."""
    place = folder / uuid.uuid4().hex
    place.mkdir()
    label_picture(segmented.labels, len(segmented.classes)).save(place / "mask.png")
    files = [str(place / "mask.png")]
    for number, support in enumerate(learned, start=1):
        tame = "".join(c if c.isalnum() or c in "-_" else "_" for c in support.name)
        support.save(place / f"{tame}-{number}.safetensors")
        files.append(str(place / f"{tame}-{number}.safetensors"))
    return files


def summary(segmented: Segmented) -> str:
    """What was found, as Markdown."""
    lines = []
    for index, name in enumerate(segmented.classes):
        share = float(segmented.mask_of(name).mean())
        best = float(segmented.probabilities[index].max())
        lines.append(f"- {_escaped(name)}: {share:.1%} of the picture, highest probability {best:.2f}")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return "".join(f"&#{ord(c)};" if not c.isalnum() and c != " " else c for c in text)


def build(segmenter: Segmenter, folder: Path, pictures: Sequence[str] = ()) -> gr.Blocks:
    """The page. `folder` is for what it gives to download, `pictures` are queries to pick from."""
    model = Model(segmenter)

    def add(
        name: str, drawing: dict[str, Any] | None, reading: str, mask_file: str | None, examples: list[Example]
    ) -> Any:
        more = _told(lambda: with_example(examples, marked(name, drawing, READINGS[reading], mask_file)))
        return more, [shown(example) for example in more]

    def remove(examples: list[Example]) -> Any:
        return examples[:-1], [shown(example) for example in examples[:-1]]

    def segment(examples: list[Example], query: str | None) -> Any:
        def work() -> tuple[Any, ...]:
            if not query:
                raise InputError("expected a picture to segment, found none; drop one into its place")
            image = read_picture(query)
            segmented, learned = model.segment(examples, image)
            files = written(segmented, learned, folder)
            overlay = label_overlay(image, segmented.labels.astype(np.int64), segmented.classes)
            return overlay, summary(segmented), gr.update(value=files, visible=True)

        return _told(work)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n{_introduction(model.classes)}")
        examples = gr.State([])
        with gr.Row():
            with gr.Column():
                gr.Markdown("### 1 · Examples: mark the object")
                editor = gr.ImageEditor(
                    label="Picture", type="pil", sources=("upload", "clipboard"), transforms=(), layers=False,
                    brush=gr.Brush(default_size=BRUSH_PX, colors=[BRUSH], default_color=BRUSH, color_mode="fixed"),
                    height=480,
                    buttons=[], format="png", elem_id="editor",
                )  # fmt: skip
                reading = gr.Radio(list(READINGS), value=next(iter(READINGS)), label="Strokes are", elem_id="reading")
                with gr.Row(equal_height=True):
                    name = gr.Textbox(label="Class", value="object", max_lines=1, max_length=80, elem_id="name")
                    mask_file = gr.File(
                        label="Mask, instead of strokes (PNG)", file_types=[".png"], type="filepath", height=110,
                        elem_id="mask-file",
                    )  # fmt: skip
                with gr.Row():
                    adding = gr.Button("Add example", variant="primary", elem_id="add")
                    removing = gr.Button("Remove last", elem_id="remove")
                gallery = gr.Gallery(
                    label="Examples", show_label=False, columns=MOST_EXAMPLES, height=140, object_fit="contain",
                    interactive=False, buttons=[], format="png", elem_id="examples",
                )  # fmt: skip
            with gr.Column():
                gr.Markdown("### 2 · Picture to segment")
                query = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=300,
                    buttons=[], elem_id="query",
                )  # fmt: skip
                if pictures:
                    gr.Examples([[picture] for picture in pictures], [query], label="Or pick one", elem_id="pick")
                segmenting = gr.Button("Segment", variant="primary", elem_id="segment")
                result = gr.Image(
                    label="Result", interactive=False, format="png", buttons=["fullscreen"], elem_id="result"
                )
                found = gr.Markdown(elem_id="found")
                files = gr.File(label=GIVEN, elem_id="files", interactive=False, visible=False)
        added = adding.click(add, [name, editor, reading, mask_file, examples], [examples, gallery])
        # Apart: an editor that waits for a change of its own would go on to show that it does. Not None, which it
        # would take for no change the second time.
        empty: dict[str, Any] = {"background": None, "layers": [], "composite": None}
        added.success(lambda: (empty, None), None, [editor, mask_file], show_progress="hidden")
        removing.click(remove, examples, [examples, gallery])
        segmenting.click(segment, [examples, query], [result, found, files], concurrency_limit=1)
    return page


def launch(page: gr.Blocks, port: int) -> str:
    """Serve the page on loopback, in threads of its own; gives its address.

    Raises InputError where the port is taken.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1", server_port=port, share=False, inbrowser=False, prevent_thread_lock=True,
            quiet=True, footer_links=[], run_history=False, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, max_file_size=MOST_BYTES, theme=theme, css=STYLE,
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"expected port {port} to be free on this machine, found it taken; give another --port"
        ) from error
    return str(address)


def _told(work: Any) -> Any:
    """What the work gives; a mistake of the visitor's is shown on the page in words."""
    try:
        return work()
    except InputError as error:
        raise gr.Error(_escaped(str(error)), title="Not yet", print_exception=False) from error


def _introduction(classes: Sequence[str]) -> str:
    text = (
        f"Mark one to {MOST_EXAMPLES} pictures of an object, then segment another picture by them. Several classes at "
        "once: give each its own name."
    )
    return f"{text}\n\nLearnt already: {', '.join(map(_escaped, classes))}." if classes else text
