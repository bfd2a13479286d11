"""The COCO 2014 layout: annotations/instances_{train,val}2014.json with train2014/ and val2014/."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool

from mshnet.data.source import Folder, ImageRecord, LabelledImage, Source, fingerprint_of
from mshnet.errors import DatasetNotFoundError, InputError

CLASSES = 80
SUBSETS = ("train", "val")


@dataclass(slots=True)
class _Image:
    """One image of the JSON with its instances: (category id, annotation id, polygons or RLE)."""

    file_name: str
    height: int
    width: int
    instances: list[tuple[int, int, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Annotations:
    categories: dict[int, str]
    images: dict[str, _Image]
    sha256: str


class CocoSource(Source):
    """Reads the two instance files once per process, however many tasks of that process ask for them."""

    dataset = "coco"
    mask_mode = "union of annToMask, crowds skipped"

    def __init__(self, root: str) -> None:
        self.root = root

    def __reduce__(self) -> tuple[type[CocoSource], tuple[str]]:
        return CocoSource, (self.root,)

    @cached_property
    def _folder(self) -> Folder:
        folder = Folder(self.root)
        wanted = [f"annotations/instances_{s}2014.json" for s in SUBSETS] + [f"{s}2014" for s in SUBSETS]
        missing = [w for w in wanted if not (folder.has_file if w.endswith(".json") else folder.has_dir)(w)]
        if missing:
            raise DatasetNotFoundError(
                f"no COCO 2014 under '{self.root}' (looked for {', '.join(wanted)}; "
                f"missing {', '.join(missing)}): give the folder that holds them"
            )
        return folder

    @cached_property
    def _annotations(self) -> dict[str, _Annotations]:
        found = {s: _cached_annotations(self.root, s, _version(self._folder, s)) for s in SUBSETS}
        if found["train"].categories != found["val"].categories:
            raise InputError(f"the categories of the train and val annotations under '{self.root}' differ")
        if len(found["val"].categories) != CLASSES:
            raise InputError(
                f"dataset coco must have {CLASSES} categories, found {len(found['val'].categories)} under "
                f"'{self.root}': its folds are defined on the {CLASSES} of COCO 2014"
            )
        return found

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in ascending category id."""
        return tuple(name for _, name in sorted(self._annotations["val"].categories.items()))

    @cached_property
    def _class_of_category(self) -> dict[int, int]:
        return {category: i for i, category in enumerate(sorted(self._annotations["val"].categories))}

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: size for s in SUBSETS for name, size in self._folder.sizes(f"{s}2014").items()}

    def records(self) -> tuple[ImageRecord, ...]:
        """Every image with at least one annotation that is not a crowd."""
        records = [
            ImageRecord(image_id=path, subset=subset, image_path=path)
            for subset, annotations in self._annotations.items()
            for path, image in annotations.images.items()
            if image.instances
        ]
        missing = [r.image_path for r in records if r.image_path not in self._sizes]
        if missing:
            raise InputError(
                f"every annotated image needs its file under '{self.root}': {len(missing)} missing, "
                f"first '{min(missing)}'; fetch them or leave them out of the JSON"
            )
        return tuple(sorted(records, key=lambda r: r.image_id))

    def load(self, record: ImageRecord) -> LabelledImage:
        """One image with the union of its instances per class. InputError for a broken or misfit file."""
        entry = self._annotations[record.subset].images[record.image_id]
        image = self._folder.read_rgb(record.image_path)
        if image.shape[:2] != (entry.height, entry.width):
            raise InputError(
                f"mask and image must have one size: the annotations of '{record.image_path}' are for "
                f"{entry.width}×{entry.height} px, the file is {image.shape[1]}×{image.shape[0]} px"
            )
        by_class: dict[int, list[tuple[int, Any]]] = {}
        for category, annotation_id, segmentation in entry.instances:
            by_class.setdefault(self._class_of_category[category], []).append((annotation_id, segmentation))
        masks = {c: _union(parts, entry) for c, parts in sorted(by_class.items())}
        # An instance smaller than a pixel gives an empty mask: the image does not show the class.
        return LabelledImage(image=image, masks={c: m for c, m in masks.items() if m.any()}, ignore=None)

    def fingerprint(self) -> str:
        """Changes with any picture's name or size and with the annotations' contents."""
        hashes = {s: a.sha256.encode() for s, a in self._annotations.items()}
        return fingerprint_of(self.dataset, self._sizes, hashes)


def _version(folder: Folder, subset: str) -> str:
    return str(folder.fs.ukey(folder.path(f"annotations/instances_{subset}2014.json")))


@lru_cache(maxsize=4)
def _cached_annotations(root: str, subset: str, version: str) -> _Annotations:
    """`version` changes with the file, so that a long-lived process never answers from an old one."""
    name = f"annotations/instances_{subset}2014.json"
    data = Folder(root).read(name)
    return _parse(data, f"{root.rstrip('/')}/{name}", subset)


def _parse(data: bytes, where: str, subset: str) -> _Annotations:
    try:
        content = json.loads(data, object_hook=_compact)
    except ValueError as error:
        raise InputError(f"'{where}' is not valid JSON: {error}; fetch the file again") from error
    missing = [k for k in ("categories", "images", "annotations") if k not in _keys(content)]
    if missing:
        raise InputError(f"'{where}' must have categories, images and annotations; it has no {', '.join(missing)}")
    try:
        categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
        images = {i["id"]: _Image(i["file_name"], int(i["height"]), int(i["width"])) for i in content["images"]}
        for annotation in content["annotations"]:
            _add(annotation, images, categories, where)
    except (KeyError, TypeError) as error:
        kind = type(error).__name__
        raise InputError(f"'{where}' is not in COCO's instance format: {kind} {error}") from error
    by_path = {f"{subset}2014/{image.file_name}": image for image in images.values()}
    return _Annotations(categories, by_path, hashlib.sha256(data).hexdigest())


def _keys(content: object) -> set[str]:
    return set(content) if isinstance(content, dict) else set()


def _compact(value: dict[str, Any]) -> dict[str, Any]:
    # Polygons as arrays while parsing: a list takes 32 bytes a coordinate (float and pointer), an array 8.
    polygons = value.get("segmentation")
    if isinstance(polygons, list):
        value["segmentation"] = [np.asarray(p, dtype=np.float64) for p in polygons]
    return value


def _add(annotation: dict[str, Any], images: dict[Any, _Image], categories: dict[int, str], where: str) -> None:
    number = annotation["id"]
    if annotation["category_id"] not in categories:
        raise InputError(
            f"'{where}': annotation {number} has category {annotation['category_id']}, "
            "which is not among the file's categories; add the category or remove the annotation"
        )
    image = images.get(annotation["image_id"])
    if image is None:
        raise InputError(
            f"'{where}': annotation {number} is of image {annotation['image_id']}, "
            "which is not among the file's images; add the image or remove the annotation"
        )
    if annotation.get("iscrowd", 0):
        return
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        _check_polygons(segmentation, number, where)
    elif tuple(segmentation["size"]) != (image.height, image.width):
        raise InputError(
            f"mask and image must have one size: '{where}', annotation {number} has an RLE of size "
            f"{list(segmentation['size'])}, its image is [{image.height}, {image.width}] (height, width)"
        )
    image.instances.append((int(annotation["category_id"]), int(number), segmentation))


def _check_polygons(polygons: list[np.ndarray], number: object, where: str) -> None:
    sizes = [p.size for p in polygons] or [0]
    if min(sizes) < 6 or any(n % 2 for n in sizes):
        raise InputError(
            f"'{where}': annotation {number} has a polygon of {min(sizes) / 2:g} points, "
            "expected pairs of x and y, at least 3 points; mend or remove the annotation"
        )


def _union(parts: list[tuple[int, Any]], image: _Image) -> Bool[np.ndarray, "H W"]:
    """What `annToMask` gives for each instance, united (the same run-length code, nothing printed)."""
    from pycocotools import mask as rle_code

    runs: list[Any] = []
    for number, segmentation in parts:
        try:
            if isinstance(segmentation, list):
                runs += rle_code.frPyObjects(segmentation, image.height, image.width)
            elif isinstance(segmentation["counts"], list):
                runs.append(rle_code.frPyObjects(segmentation, image.height, image.width))
            else:
                runs.append(segmentation)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"annotation {number} of '{image.file_name}' has no readable mask: {error}") from error
    decoded: Bool[np.ndarray, "H W"] = rle_code.decode(rle_code.merge(runs)).astype(bool)
    return decoded
