"""Generated pictures in the layouts of one's own data, with any number of classes up to 80.

`python -m mshnet.data.shapes --layout coco-json --out DIR --images 120 --classes 7`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mshnet.data.drawing import draw_scene, look_of
from mshnet.data.shapes import OwnLayout, annotation, check_drawing, finish, is_done, label_map, plan, write_jpeg
from mshnet.errors import InputError

FIRST_CATEGORY, CATEGORY_STEP = 101, 7
"""Category ids are 101, 108, 115, ...: neither from 0 or 1 nor without gaps."""


def write_coco_json(folder: str | Path, images: int = 120, size_px: int = 128, seed: int = 0, classes: int = 7) -> None:
    """Write `annotations.json` and `images/*.jpg`; nothing is done where the same is there already.

    Objects seen whole are polygons, others uncompressed RLE; 1 to 4 objects per picture, classes dealt evenly, so that
    each class is in about images / 3.5 pictures (7 classes). InputError where the folder holds something else.
    """
    root = Path(folder)
    if is_done(root, _parameters("coco-json", images, size_px, seed, classes)):
        return
    (root / "images").mkdir(exist_ok=True)
    ids = [FIRST_CATEGORY + CATEGORY_STEP * i for i in range(classes)]
    content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": ids[i], "name": look_of(i).name} for i in range(classes)]
    for index, _, shown in plan(classes, images, seed, val_every=0):
        picture, placed = draw_scene(np.random.default_rng((seed, index)), shown, size_px)
        name = f"shapes_{index:06d}.jpg"
        write_jpeg(picture, root / "images" / name)
        height, width = picture.shape[:2]
        content["images"].append({"id": index + 1, "file_name": name, "height": height, "width": width})
        content["annotations"] += [
            annotation(p, index + 1, 100 * index + k + 1, ids[p.class_id]) for k, p in enumerate(placed)
        ]
    (root / "annotations.json").write_text(json.dumps(content))
    finish(root)


def write_label_png(folder: str | Path, images: int = 120, size_px: int = 128, seed: int = 0, classes: int = 7) -> None:
    """Write `images/*.jpg`, `masks/*.png` (a label per pixel, outlines 255) and `classes.txt`; else as above."""
    from mshnet.data.pascal import write_label

    root = Path(folder)
    if is_done(root, _parameters("label-png", images, size_px, seed, classes)):
        return
    for part in ("images", "masks"):
        (root / part).mkdir(exist_ok=True)
    for index, _, shown in plan(classes, images, seed, val_every=0):
        picture, placed = draw_scene(np.random.default_rng((seed, index)), shown, size_px)
        write_jpeg(picture, root / "images" / f"shapes_{index:06d}.jpg")
        write_label(label_map(placed, *picture.shape[:2]), root / "masks" / f"shapes_{index:06d}.png")
    (root / "classes.txt").write_text("".join(f"{look_of(i).name}\n" for i in range(classes)))
    finish(root)


def write_fss(folder: str | Path, images: int = 70, size_px: int = 128, seed: int = 0, classes: int = 7) -> None:
    """Write `CLASS/N.jpg` and `CLASS/N.png` (white where the object is), one object each, N from 1; else as above."""
    root = Path(folder)
    if is_done(root, _parameters("fss", images, size_px, seed, classes)):
        return
    for index in range(images):
        class_id, number = index % classes, index // classes + 1
        inside = root / look_of(class_id).name
        inside.mkdir(exist_ok=True)
        picture, (placed,) = draw_scene(np.random.default_rng((seed, index)), [class_id], size_px)
        write_jpeg(picture, inside / f"{number}.jpg")
        Image.fromarray(placed.visible).convert("L").save(inside / f"{number}.png")
    finish(root)


WRITERS: Mapping[OwnLayout, Callable[[Path, int, int, int, int], None]] = {
    "coco-json": write_coco_json,
    "label-png": write_label_png,
    "fss": write_fss,
}


def _parameters(layout: OwnLayout, images: int, size_px: int, seed: int, classes: int) -> dict[str, Any]:
    if not 2 <= classes <= 80:
        raise InputError(f"classes must be 2..80, got {classes}")
    if images < classes:
        raise InputError(f"images must be as many as classes or more, got {images} and {classes}")
    check_drawing(size_px, seed)
    return {
        "generator": 1, "layout": layout, "images": images, "size_px": size_px, "seed": seed, "classes": classes,
    }  # fmt: skip
