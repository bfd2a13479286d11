"""A COCO JSON file and pictures as bad as people's own, all of it usable, and what a reader has to make of it.

Objects are light on dark ground, so that a picture and a mask that lie differently are found out.
"""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import ExifTags, Image

from mshnet.data.own import OwnData

HEIGHT, WIDTH = 96, 120
GROUND = 40
CLASSES = ("крыша 屋根", "crack", "Pothole (large)", "manhole")
"""After the class file; class i is of `LIGHT[i]`."""
LIGHT = (150, 180, 210, 240)
# Two of one name, one that no image shows, one to leave out; ids beyond 2^53, where doubles end, and of text.
CATEGORIES: list[dict[str, Any]] = [
    {"id": 9_007_199_254_740_993, "name": "manhole", "supercategory": ""},
    {"id": -5, "name": "крыша 屋根", "color": "#ff0000"},
    {"id": 3, "name": "crack"},
    {"id": "b7", "name": "dirt"},
    {"id": 17.0, "name": "crack"},
    {"id": 9_007_199_254_740_992, "name": "Pothole (large)"},
    {"id": "empty", "name": "unused"},
]
CHOICE = {"merge": {"crack": ["crack"]}, "leave_out": ["dirt"]}
_IDS: tuple[tuple[Any, ...], ...] = ((-5,), (3, 17, "17"), (9_007_199_254_740_992,), (9_007_199_254_740_993,))

Masks = dict[str, Bool[np.ndarray, "H W"]]
Box = tuple[int, int, int, int]
"""Rows from, to, columns from, to."""


@dataclass(frozen=True, kw_only=True)
class Awkward:
    """Where it lies, and the masks of each image by class name."""

    own: OwnData
    truth: dict[str, Masks]
    notes: dict[str, str]
    """Part of what the reader says of an image; of all others it says nothing."""


def write_awkward_coco_json(folder: Path) -> Awkward:
    """Write `pictures/`, `labels.json` and `classes.json`; 24 images, four classes that remain (and an empty one)."""
    drawing = _Drawing(folder / "pictures")
    for draw in (_masks, _names, _pixels, _turned):
        draw(drawing)
    content = {
        "info": {"year": None},
        "licenses": [],
        "images": drawing.images[::-1],
        "categories": CATEGORIES,
        "annotations": drawing.annotations[::-1],
    }
    text = json.dumps(content, ensure_ascii=False)
    (folder / "labels.json").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows' programs begin a file
    (folder / "classes.json").write_text(json.dumps(CHOICE))
    own = OwnData(
        images=str(folder / "pictures"),
        annotations=str(folder / "labels.json"),
        classes=str(folder / "classes.json"),
    )
    return Awkward(own=own, truth=drawing.truth, notes=drawing.notes)


class _Drawing:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.truth: dict[str, Masks] = {}
        self.notes: dict[str, str] = {}
        self._ids = _image_ids()

    def add(
        self,
        name: str,
        objects: list[tuple[int, Any]] | None = None,
        *,
        written: str | None = None,
        size: tuple[int, int] = (HEIGHT, WIDTH),
        stored: Callable[[Image.Image], Image.Image] = lambda picture: picture,
        **options: Any,
    ) -> dict[str, Any]:
        """A picture of objects (class, what of it is drawn), and its annotations; `written` is its name in the JSON."""
        objects = _two(len(self.images), size) if objects is None else objects
        pixels = np.full((*size, 3), GROUND, dtype=np.uint8)
        image = {"id": next(self._ids), "file_name": written or name, "height": size[0], "width": size[1]}
        masks: Masks = {}
        for class_id, (mask, segmentation) in objects:
            pixels[mask] = LIGHT[class_id]
            masks[CLASSES[class_id]] = masks.get(CLASSES[class_id], False) | mask
            self._annotate(image, class_id, segmentation)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        stored(Image.fromarray(pixels)).save(path, **options)
        self.images.append(image)
        if masks:
            self.truth[name] = masks
        return image

    def _annotate(self, image: dict[str, Any], class_id: int, segmentation: Any, **more: Any) -> None:
        number = len(self.annotations)
        ids = _IDS[class_id]
        annotation = {"image_id": image["id"], "category_id": ids[number % len(ids)], "segmentation": segmentation}
        if number % 3:  # of every third there is none
            annotation |= {"id": 10**15 + 7 * number, "iscrowd": number % 3 == 1 and 0, "attributes": {"who": "é"}}
        self.annotations.append(annotation | more)

    def crowd(self, image: dict[str, Any], class_id: int, segmentation: Any) -> None:
        """Over the whole picture: whoever did not skip it would mark everything."""
        self._annotate(image, class_id, segmentation, iscrowd=1)

    def left_out(self, image: dict[str, Any]) -> None:
        """An annotation of a category that the class file leaves out, and whose mask is none."""
        self.annotations.append({"image_id": image["id"], "category_id": "b7", "segmentation": []})


def polygon(box: Box, size: tuple[int, int] = (HEIGHT, WIDTH)) -> tuple[Bool[np.ndarray, "H W"], list[list[float]]]:
    """A rectangle, exact to the pixel in COCO's rendering."""
    top, bottom, left, right = box
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask, [[left, top, right, top, right, bottom, left, bottom]]


def compressed(mask: Bool[np.ndarray, "H W"]) -> tuple[Bool[np.ndarray, "H W"], dict[str, Any]]:
    """The mask as COCO's compressed run lengths."""
    from pycocotools import mask as rle_code

    rle = rle_code.encode(np.asfortranarray(mask.astype(np.uint8)))
    return mask, {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def uncompressed(mask: Bool[np.ndarray, "H W"]) -> tuple[Bool[np.ndarray, "H W"], dict[str, Any]]:
    """The mask as plain run lengths."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(np.diff(np.concatenate([flat, [not flat[-1]]])))
    return mask, {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def holed(box: Box, hole: Box) -> Bool[np.ndarray, "H W"]:
    """A rectangle with a rectangular hole."""
    return polygon(box)[0] & ~polygon(hole)[0]


def _two(number: int, size: tuple[int, int]) -> list[tuple[int, Any]]:
    """Two objects of two classes, of about 2,300 and 3,000 pixels, lying differently in every direction."""
    first, second = number % 4, (number + 1) % 4
    return [(first, polygon((4, 52, 3, 51), size)), (second, compressed(polygon((34, 90, 55, 110), size)[0]))]


def _image_ids() -> Iterator[Any]:
    """Numbers beyond 2^53, text, 0, fractions of nothing: each of another kind."""
    number = 0
    while True:
        yield (9_007_199_254_740_993 + number, f"img {number}", -number, float(number) + 100)[number % 4]
        number += 1


def _masks(drawing: _Drawing) -> None:
    ring = holed((4, 64, 3, 63), (24, 44, 23, 43))
    drawing.add("hole compressed.jpg", [(0, compressed(ring))])
    drawing.add("hole uncompressed.jpg", [(1, uncompressed(ring))])
    first, outer = polygon((4, 64, 3, 63))
    _, inner = polygon((24, 44, 23, 43))
    # A polygon inside of a polygon is no hole in COCO's format: parts are united.
    drawing.add("polygon in polygon.jpg", [(2, (first, outer + inner))])
    apart, parts = polygon((4, 52, 3, 51)), polygon((54, 92, 60, 116))
    drawing.add("two parts.jpg", [(3, (apart[0] | parts[0], apart[1] + parts[1]))])
    mixed = [(0, polygon((4, 52, 3, 51))), (0, compressed(polygon((40, 90, 40, 90))[0])), (1, uncompressed(parts[0]))]
    drawing.add("polygons and runs.jpg", mixed)
    image = drawing.add("crowd.jpg")
    drawing.crowd(image, 3, uncompressed(np.ones((HEIGHT, WIDTH), dtype=bool))[1])
    drawing.left_out(image)
    only = drawing.add("only a crowd.jpg", [])
    drawing.crowd(only, 2, compressed(np.ones((HEIGHT, WIDTH), dtype=bool))[1])
    drawing.add("without annotation.jpg", [])
    beyond, _ = polygon((4, 96, 60, 120))
    drawing.add("beyond the border.jpg", [(2, (beyond, [[60, 4, 150, 4, 150, 110, 60, 110]]))])


def _names(drawing: _Drawing) -> None:
    drawing.add("Größe/日本 語 (1).jpg")
    drawing.add("a b/c  d.JPG", format="JPEG")
    drawing.add("100%#1?[x]*.jpg")
    drawing.add("from windows/1.jpg", written="from windows\\1.jpg")
    drawing.add("dotted/1.jpg", written="./dotted/1.jpg")  # a base name that occurs twice
    accents = unicodedata.normalize("NFD", "é à ü.jpg")  # as a Mac stores it
    drawing.add(accents, written=unicodedata.normalize("NFC", accents))


def _pixels(drawing: _Drawing) -> None:
    def deep(picture: Image.Image) -> Image.Image:
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)

    def transparent(picture: Image.Image) -> Image.Image:
        picture.putalpha(255)
        return picture

    drawing.add("grey.jpg", stored=lambda p: p.convert("L"))
    drawing.add("cmyk.jpg", stored=lambda p: p.convert("CMYK"))
    drawing.add("16 bit.png", stored=deep)
    drawing.add("palette.png", stored=lambda p: p.quantize(16))
    drawing.add("transparent.png", stored=transparent)
    drawing.add("one bit.png", stored=lambda p: p.convert("L").point(lambda v: 255 * (v > 100)).convert("1"))
    for name, mode in (("cmyk.jpg", "CMYK"), ("16 bit.png", "I;16"), ("transparent.png", "RGBA"), ("one bit.png", "1")):
        drawing.notes[name] = f"its pixels ({mode}) became 8-bit RGB"


def _turned(drawing: _Drawing) -> None:
    def exif(orientation: int) -> bytes:
        tags = Image.Exif()
        tags[ExifTags.Base.Orientation] = orientation
        return tags.tobytes()

    # Labelled as a viewer shows it, stored as the sensor lay.
    turns = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, turn in turns.items():
        name = f"turned {orientation}.jpg"
        drawing.add(name, stored=lambda p, turn=turn: p.transpose(turn), exif=exif(orientation))
        drawing.notes[name] = "turned upright, as its labels are"
    drawing.add("not turned.jpg", exif=exif(6))  # labelled as stored
    drawing.add("square.jpg", size=(HEIGHT + 16, HEIGHT + 16), exif=exif(6))
    drawing.add("upside down.jpg", exif=exif(3))
    for name in ("square.jpg", "upside down.jpg"):
        drawing.notes[name] = "its size does not tell whether its labels are: left as stored"


def encoded(picture: UInt8[np.ndarray, "H W 3"], format: str) -> bytes:
    """A picture file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=format)
    return buffer.getvalue()
