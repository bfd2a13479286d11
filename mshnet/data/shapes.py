"""Generated labelled images ("shapes") in the real layouts: VOC with 20 classes, COCO JSON with 80, and those of one's
own data (`mshnet.data.shapes_own`) with any number.

`python -m mshnet.data.shapes --layout voc --out DIR --images 600 --size-px 128 --seed 0`

For trying things out and for tests: the real readers read it. Every third image is a validation image;
classes are dealt out in turns, so that each has about the same number of images in both subsets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from mshnet.data.drawing import Placed, draw_scene, look_of
from mshnet.errors import InputError

Layout = Literal["voc", "coco"]
OwnLayout = Literal["coco-json", "label-png", "fss"]
CLASSES = {"voc": 20, "coco": 80}
MARKER = "shapes.json"
"""Says with which parameters a folder was generated; written last."""
PARTS = ("JPEGImages", "annotations", "train2014", "val2014", "images", "masks", "annotations.json")
"""Of a folder that holds a data set."""
BEGUN = ".shapes.begun.json"
"""The same while writing: a run that was stopped is done again, as the same images."""

# The 80 of the 90 category ids that COCO uses: a reader that took the id for the class would be found out.
CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def class_names(layout: Layout) -> tuple[str, ...]:
    """The generated classes' names by class id, such as `fine striped disc`."""
    return tuple(look_of(i).name for i in range(CLASSES[layout]))


def write_voc(root: str | Path, images: int = 600, size_px: int = 128, seed: int = 0) -> None:
    """Write JPEGImages, SegmentationClassAug and ImageSets; nothing is done where the same is there already.

    Objects are outlined by a thin line of 255, as in VOC. InputError where the folder holds something else.
    """
    from mshnet.data.pascal import IMAGES, LISTS, MASKS, write_label

    folder = Path(root)
    parameters = _parameters("voc", images, size_px, seed)
    if is_done(folder, parameters):
        return
    for part in (IMAGES, MASKS, LISTS):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for index, subset, classes in plan(CLASSES["voc"], images, seed):
        picture, placed = draw_scene(np.random.default_rng((seed, index)), classes, size_px)
        image_id = f"shapes_{index:06d}"
        lists[subset].append(image_id)
        write_jpeg(picture, folder / IMAGES / f"{image_id}.jpg")
        write_label(label_map(placed, picture.shape[0], picture.shape[1]), folder / MASKS / f"{image_id}.png")
    everything = sorted(lists["train"] + lists["val"])
    for name, ids in {**lists, "trainaug": lists["train"], "trainval": everything}.items():
        (folder / LISTS / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
    finish(folder)


def write_coco(root: str | Path, images: int = 600, size_px: int = 128, seed: int = 0) -> None:
    """Write annotations/instances_{train,val}2014.json with {train,val}2014/; else as `write_voc`.

    Objects seen whole are polygons, others uncompressed RLE, and some images have a crowd.
    """
    folder = Path(root)
    parameters = _parameters("coco", images, size_px, seed)
    if is_done(folder, parameters):
        return
    names = class_names("coco")
    categories = [{"id": c, "name": names[i], "supercategory": "shapes"} for i, c in enumerate(CATEGORY_IDS)]
    content: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for subset in ("train", "val"):
        (folder / f"{subset}2014").mkdir(parents=True, exist_ok=True)
        content[subset] = {"images": [], "annotations": [], "categories": categories}
    for index, subset, classes in plan(CLASSES["coco"], images, seed):
        rng = np.random.default_rng((seed, index))
        crowd_class = int(rng.integers(CLASSES["coco"])) if index % 16 == 7 else None
        picture, placed = draw_scene(rng, classes, size_px, crowd_class)
        height, width = picture.shape[:2]
        name = f"COCO_{subset}2014_{index:012d}.jpg"
        write_jpeg(picture, folder / f"{subset}2014" / name)
        content[subset]["images"].append({"id": index, "file_name": name, "height": height, "width": width})
        content[subset]["annotations"] += [annotation(p, index, 100 * index + k) for k, p in enumerate(placed)]
    (folder / "annotations").mkdir(exist_ok=True)
    for subset, part in content.items():
        (folder / "annotations" / f"instances_{subset}2014.json").write_text(json.dumps(part))
    finish(folder)


def plan(class_count: int, images: int, seed: int, val_every: int = 3) -> Iterator[tuple[int, str, list[int]]]:
    """(image number, subset, class per object): classes are dealt like cards, one pack per subset."""
    from tqdm import tqdm

    rng = np.random.default_rng((seed, 1 << 32))
    packs: dict[str, list[int]] = {"train": [], "val": []}
    for index in tqdm(range(images), desc="drawing", unit="image", disable=None):
        subset = "val" if val_every and index % val_every == val_every - 1 else "train"
        pack = packs[subset]
        objects = int(rng.choice(4, p=(0.35, 0.35, 0.2, 0.1))) + 1
        classes: list[int] = []
        while len(classes) < objects:
            if classes and rng.random() < 0.25:
                classes.append(classes[int(rng.integers(len(classes)))])
                continue
            if not pack:
                pack += rng.permutation(class_count).tolist()
            classes.append(pack.pop())
        yield index, subset, classes


def _parameters(layout: Layout, images: int, size_px: int, seed: int) -> dict[str, Any]:
    if images < 3:
        raise InputError(f"images must be 3 or more (every third is a validation image), got {images}")
    check_drawing(size_px, seed)
    return {"generator": 1, "layout": layout, "images": images, "size_px": size_px, "seed": seed}


def check_drawing(size_px: int, seed: int) -> None:
    """InputError for a size or a seed that cannot be drawn."""
    if not 32 <= size_px <= 2048:
        raise InputError(f"size-px must be 32..2048, got {size_px}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")


def is_done(folder: Path, parameters: dict[str, Any]) -> bool:
    """Whether the folder holds exactly this already; marks it as begun where it does not."""
    for marker in (folder / MARKER, folder / BEGUN):
        if marker.is_file():
            found = json.loads(marker.read_text())
            if found != parameters:
                raise InputError(
                    f"'{folder}' holds images generated with {found}, asked for {parameters}: give another folder"
                )
            return marker.name == MARKER
    if any((folder / part).exists() for part in PARTS):
        raise InputError(f"'{folder}' holds images that were not generated here: give an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BEGUN).write_text(json.dumps(parameters))
    return False


def finish(folder: Path) -> None:
    """Say that the folder is whole."""
    (folder / BEGUN).replace(folder / MARKER)


def write_jpeg(picture: UInt8[np.ndarray, "H W 3"], path: Path) -> None:
    """Of good quality, colour at full size."""
    Image.fromarray(picture).save(path, format="JPEG", quality=95, subsampling=0)


def label_map(placed: list[Placed], height: int, width: int) -> UInt8[np.ndarray, "H W"]:
    """Class id + 1, 0 for ground, 255 on the line where two values meet."""
    instance = np.zeros((height, width), dtype=np.int64)
    label = np.zeros((height, width), dtype=np.uint8)
    for number, p in enumerate(placed, 1):
        instance[p.visible] = number
        label[p.visible] = p.class_id + 1
    border = np.zeros_like(label, dtype=bool)
    border[:, :-1] |= instance[:, :-1] != instance[:, 1:]
    border[:-1] |= instance[:-1] != instance[1:]
    label[border] = 255
    return label


def annotation(placed: Placed, image_id: int, number: int, category_id: int | None = None) -> dict[str, Any]:
    """An object as COCO has it; of another category than COCO's where one is given."""
    height, width = placed.visible.shape
    ys, xs = np.nonzero(placed.visible)
    segmentation: object
    leaves = bool((placed.outline < 0).any() or (placed.outline > (width, height)).any())
    if placed.occluded or leaves:
        segmentation = {"counts": _run_lengths(placed.visible), "size": [height, width]}
    else:
        segmentation = [[round(float(v), 2) for v in placed.outline.ravel()]]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORY_IDS[placed.class_id] if category_id is None else category_id,
        "iscrowd": int(placed.crowd),
        "area": int(placed.visible.sum()),
        "bbox": [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1],
        "segmentation": segmentation,
    }


def _run_lengths(mask: Bool[np.ndarray, "H W"]) -> list[int]:
    """COCO's uncompressed run lengths: column by column, the first run is of zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs: list[int] = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def is_generated(root: str | Path) -> bool:
    """Whether the folder holds a finished generated set, whatever its parameters."""
    return (Path(root) / MARKER).is_file()


def generate(
    layout: Layout | OwnLayout, out: Path, images: int = 600, size_px: int = 128, seed: int = 0, classes: int = 7
) -> None:
    """Generate labelled images of textured objects in a real data set's layout.

    Args:
        layout: voc (20 classes) or coco (80 classes), or one's own data's: coco-json, label-png (`--dataset voc`), fss.
        out: Folder to write to; left alone when it already holds exactly this.
        images: How many; of voc and coco every third is a validation image.
        size_px: Longer side in pixels.
        seed: The same seed gives the same images.
        classes: How many (2..80), of coco-json, label-png and fss.
    """
    if layout == "voc":
        write_voc(out, images=images, size_px=size_px, seed=seed)
    elif layout == "coco":
        write_coco(out, images=images, size_px=size_px, seed=seed)
    else:
        from mshnet.data.shapes_own import WRITERS

        WRITERS[layout](out, images, size_px, seed, classes)


if __name__ == "__main__":
    from mshnet.command_line import run

    run(generate, "python -m mshnet.data.shapes")
