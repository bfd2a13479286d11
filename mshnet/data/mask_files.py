"""A mask from a file: label pictures (PNG and the like), COCO JSON by the image's name, polygons."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Bool, Integer
from PIL import Image

from mshnet.data.filesystem import filesystem
from mshnet.data.instances import check_segmentation, decoded, joined, mappable, masks_of
from mshnet.data.picture_files import opened, read_bytes
from mshnet.data.source import ImageRecord
from mshnet.errors import InputError


class _Category(msgspec.Struct):
    id: int | str
    name: str


class _Image(msgspec.Struct):
    id: int | str
    file_name: str
    height: int = 0
    width: int = 0


class _Annotation(msgspec.Struct, gc=False):
    image_id: int | str
    category_id: int | str
    segmentation: msgspec.Raw = msgspec.Raw(b"[]")
    id: int | str = 0
    iscrowd: int = 0


class _Coco(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def read(given: str, height: int, width: int, image_name: str = "") -> Bool[np.ndarray, "_ _"]:
    """`mask.png`, `labels.png#3`, `annotations.json#category` or `polygons.json`, see `mshnet.data.masks`."""
    path, choice = _parted(given)
    if path.lower().endswith(".json"):
        return _from_json(path, choice, (height, width), image_name)
    if choice and not choice.isdigit():
        raise InputError(f"expected a label (a whole number) after the # of '{given}', found {choice!r}")
    found = labels(opened(path), f"'{path}'", chosen=bool(choice))
    return np.asarray(found == int(choice) if choice else found != 0)


def labels(picture: Image.Image, what: str, chosen: bool = False) -> Integer[np.ndarray, "H W"]:
    """The numbers of a label picture. Raises InputError where they would be a guess.

    Those are JPEG, colours, partial transparency, and a palette's several labels where none was `chosen`.
    """
    if picture.format in ("JPEG", "MPO"):
        raise InputError(f"expected {what} as PNG, found JPEG, which blurs labels into others; export it as PNG")
    if picture.mode in ("RGB", "RGBA", "LA"):
        return _of_channels(np.asarray(picture), what, has_alpha=picture.mode != "RGB")
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
        raise InputError(f"expected {what} as grey, palette or black and white, found {picture.mode}")
    numbers = np.asarray(picture).astype(np.int64)
    if picture.mode == "P" and not chosen:
        found = np.setdiff1d(np.unique(numbers), [0])
        if len(found) > 1:
            raise InputError(
                f"expected one label in {what}, found {_some(found)}; name the object's, e.g. masks.png#{found[0]}"
            )
    return numbers


def united(parts: Iterable[tuple[int | str, object]], height: int, width: int, where: str) -> Bool[np.ndarray, "H W"]:
    """Polygons and run lengths (each with a number for errors) as one mask, as pycocotools fills them."""
    instances = []
    for number, segmentation in parts:
        raw = segmentation if isinstance(segmentation, msgspec.Raw) else msgspec.Raw(_json(segmentation, where))
        check_segmentation(raw, (height, width), number, where)
        instances.append((0, number, raw))
    record = ImageRecord(
        image_id=where, subset="train", image_path=where, height=height, width=width, instances=joined(instances)
    )
    return masks_of(record).get(0, np.zeros((height, width), dtype=bool))


def declared(size: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width that an annotation is for: the image's, or those of the image before it is turned upright."""
    return (width, height) if size is not None and tuple(size) == (width, height) else (height, width)


def _json(segmentation: object, where: str) -> bytes:
    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return value.tolist()
        raise NotImplementedError

    if isinstance(segmentation, Mapping):  # pycocotools gives bytes, which JSON would have as base64
        counts = segmentation.get("counts")
        segmentation = {**segmentation, "counts": counts.decode() if isinstance(counts, bytes) else counts}
    try:
        return msgspec.json.encode(segmentation, enc_hook=plain)
    except (TypeError, NotImplementedError) as error:
        raise InputError(f"'{where}': expected polygons or a COCO RLE of plain numbers ({error})") from error


def _of_channels(pixels: Any, what: str, has_alpha: bool) -> Integer[np.ndarray, "H W"]:
    colours, alpha = (pixels[..., :-1], pixels[..., -1]) if has_alpha else (pixels, np.zeros((1, 1)))
    if alpha.min() != alpha.max():
        raise InputError(f"{what} is partly transparent, which may or may not mean the object; export it as grey PNG")
    if (colours != colours[..., :1]).any():
        raise InputError(f"{what} is in colours, which say no label; export it as grey or palette PNG")
    return np.asarray(colours[..., 0].astype(np.int64))


def _parted(given: str) -> tuple[str, str]:
    """Path and what follows the last #; a file may have a # in its own name."""
    path, mark, choice = given.rpartition("#")
    if not mark:
        return given, ""
    fs, whole = filesystem(given)
    return (given, "") if fs.isfile(whole) else (path, choice)


def _from_json(path: str, choice: str, size: tuple[int, int], image_name: str) -> Bool[np.ndarray, "H W"]:
    data = read_bytes(path)
    if b'"annotations"' in data and b'"images"' in data:
        return _of_coco(path, choice, size, image_name)
    try:
        content = json.loads(data)
    except ValueError as error:
        raise InputError(f"'{path}' is not valid JSON: {error}; export it again") from error
    if isinstance(content, dict) and "counts" in content:
        return united([(0, content)], *declared(content.get("size"), *size), path)
    if isinstance(content, dict):
        size = declared((content.get("imageHeight"), content.get("imageWidth")), *size)
    polygons = _polygons(content, path, choice)
    return united(enumerate([polygon] for polygon in polygons), *size, path)


def _polygons(content: Any, path: str, choice: str) -> list[Any]:
    """A list of polygons, or labelme's shapes of one label."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise InputError(
            f"expected COCO's JSON, an RLE, a list of polygons or labelme's shapes in '{path}', found none of them"
        )
    shapes = content["shapes"]
    names = sorted({str(shape.get("label")) for shape in shapes})
    if (choice and choice not in names) or (not choice and len(names) > 1):
        raise InputError(f"expected one label of '{path}', found {_some(names)}; name it: {path}#{(names or [''])[0]}")
    wanted = [shape for shape in shapes if not choice or str(shape.get("label")) == choice]
    if others := {str(shape.get("shape_type", "polygon")) for shape in wanted} - {"polygon"}:
        raise InputError(f"expected polygons in '{path}', found {_some(sorted(others))}; draw the object's outline")
    return [[value for point in shape["points"] for value in point] for shape in wanted]


def _of_coco(path: str, choice: str, size: tuple[int, int], image_name: str) -> Bool[np.ndarray, "H W"]:
    coco: _Coco = decoded(mappable(path, _OWNER), _Coco, path)
    names = {category.id: category.name for category in coco.categories}
    # By name, all of that name; by number only where no name is so.
    wanted = {number for number, name in names.items() if name == choice} or {n for n in names if str(n) == choice}
    if not choice and len(names) == 1:
        wanted = set(names)
    if not wanted:
        known = sorted(set(names.values()))
        likely = (get_close_matches(choice, known, 1) or known or ["CATEGORY"])[0]
        raise InputError(
            f"expected a category of '{path}' ({_some(known)}), found {choice!r}; is {path}#{likely} meant?"
        )
    image = _image_of(coco.images, image_name, path)
    parts = [
        (a.id, a.segmentation)
        for a in coco.annotations
        if a.image_id == image.id and a.category_id in wanted and not a.iscrowd
    ]
    if not parts:
        raise InputError(
            f"expected an object {choice!r} in '{image.file_name}' of '{path}', found none; label one, or choose "
            "another image"
        )
    return united(parts, *declared((image.height, image.width), *size), path)


class _Owner:
    """Of the copies of remote files, which stay as long as the process."""


_OWNER = _Owner()


def _image_of(images: Iterable[_Image], image_name: str, path: str) -> _Image:
    """By the file's name; where several have it, by the folders above too."""
    wanted = PurePosixPath(image_name.replace("\\", "/"))
    found = [image for image in images if PurePosixPath(image.file_name.replace("\\", "/")).name == wanted.name]
    if len(found) > 1:
        ends = [PurePosixPath(image.file_name.replace("\\", "/")).parts for image in found]
        found = [image for image, end in zip(found, ends, strict=True) if wanted.parts[-len(end) :] == end]
    if len(found) != 1:
        raise InputError(
            f"expected one image by the name {wanted.name!r} in '{path}', found {len(found) or 'none'}; give the image "
            "that the annotations are of, by its own name"
        )
    return found[0]


def _some(items: Iterable[object]) -> str:
    listed = [str(item) for item in items]
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")
