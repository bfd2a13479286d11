"""The COCO 2014 layout: annotations/instances_{train,val}2014.json with train2014/ and val2014/."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import msgspec

from mshnet.data.instances import MASK_MODE, Name, Pixels, check_segmentation, decoded, joined, mappable, masks_of
from mshnet.data.instances import _runs as _runs  # the name its tests know
from mshnet.data.source import Folder, ImageRecord, LabelledImage, Source, fingerprint_of
from mshnet.errors import DatasetNotFoundError, InputError

CLASSES = 80
SUBSETS = ("train", "val")


class _Category(msgspec.Struct, gc=False):
    id: int
    name: Name


class _Image(msgspec.Struct, gc=False):
    id: int | str
    file_name: str
    height: Pixels
    width: Pixels


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int | str
    category_id: int
    segmentation: msgspec.Raw
    """Left as text: polygons as Python numbers would take five times the file's size."""
    iscrowd: int = 0


class _Categories(msgspec.Struct):
    categories: list[_Category]


class _Instances(msgspec.Struct):
    categories: list[_Category]
    images: list[_Image]
    annotations: list[_Annotation]


class CocoSource(Source):
    """`records` and `fingerprint` read the two instance files, `load` does not: a record holds its instances.

    The files are read through a memory map, remote ones from a temporary local copy.
    """

    dataset = "coco"
    mask_mode = MASK_MODE

    def __init__(self, root: str) -> None:
        self.root = root

    def __reduce__(self) -> tuple[type[CocoSource], tuple[str]]:
        return CocoSource, (self.root,)

    def check(self) -> None:
        """Raise DatasetNotFoundError where the layout is not there."""
        wanted = [_annotation_file(s) for s in SUBSETS] + [f"{s}2014" for s in SUBSETS]
        missing = [w for w in wanted if not (self._folder.has_file if w.endswith(".json") else self._folder.has_dir)(w)]
        if missing:
            raise DatasetNotFoundError(
                f"no COCO 2014 under '{self.root}' (looked for {', '.join(wanted)}; "
                f"missing {', '.join(missing)}): give the folder that holds them"
            )

    @cached_property
    def _folder(self) -> Folder:
        return Folder(self.root)

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The annotation files where they can be mapped."""
        self.check()
        return {s: mappable(self._where(s), self) for s in SUBSETS}

    def _where(self, subset: str) -> str:
        return f"{self.root.rstrip('/')}/{_annotation_file(subset)}"

    @cached_property
    def _categories(self) -> dict[int, str]:
        found = {}
        for subset, file in self._files.items():
            content = decoded(file, _Categories, self._where(subset))
            found[subset] = {category.id: category.name for category in content.categories}
        if found["train"] != found["val"]:
            raise InputError(f"the categories of the train and val annotations under '{self.root}' differ")
        if len(found["val"]) != CLASSES:
            raise InputError(
                f"dataset coco must have {CLASSES} categories, found {len(found['val'])} under "
                f"'{self.root}': its folds are defined on the {CLASSES} of COCO 2014"
            )
        return found["val"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in ascending category id."""
        return tuple(name for _, name in sorted(self._categories.items()))

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: size for s in SUBSETS for name, size in self._folder.sizes(f"{s}2014").items()}

    def records(self) -> Iterator[ImageRecord]:
        """Every image with at least one annotation that is not a crowd."""
        classes = {category: i for i, category in enumerate(sorted(self._categories))}
        for subset in self._files:  # in the order of the image ids, one file in memory at a time
            yield from self._records_of(subset, classes)

    def _records_of(self, subset: str, classes: dict[int, int]) -> Iterator[ImageRecord]:
        content = decoded(self._files[subset], _Instances, self._where(subset))
        _check_unique("id", (image.id for image in content.images), self._where(subset))
        _check_unique("file_name", (image.file_name for image in content.images), self._where(subset))
        images = {image.id: image for image in content.images}
        instances: dict[int | str, list[_Annotation]] = {}
        for annotation in content.annotations:
            _check(annotation, images, classes, self._where(subset))
            if not annotation.iscrowd:
                instances.setdefault(annotation.image_id, []).append(annotation)
        paths = sorted((f"{subset}2014/{images[image_id].file_name}", image_id) for image_id in instances)
        self._check_all_there([path for path, _ in paths])
        for path, image_id in paths:
            yield ImageRecord(
                image_id=path,
                subset=subset,
                image_path=path,
                height=images[image_id].height,
                width=images[image_id].width,
                instances=_joined(instances[image_id], classes),
            )

    def _check_all_there(self, paths: list[str]) -> None:
        missing = [path for path in paths if path not in self._sizes]
        if missing:
            raise InputError(
                f"every annotated image needs its file under '{self.root}': {len(missing)} missing, "
                f"first {min(missing)!r}; fetch them or leave them out of the JSON"
            )

    def load(self, record: ImageRecord) -> LabelledImage:
        """One image with the union of its instances per class. InputError for a broken or misfit file."""
        image = self._folder.read_rgb(record.image_path)
        if image.shape[:2] != (record.height, record.width):
            raise InputError(
                f"mask and image must have one size: the annotations of '{record.image_path}' are for "
                f"{record.width}×{record.height} px, the file is {image.shape[1]}×{image.shape[0]} px"
            )
        return LabelledImage(image=image, masks=masks_of(record), ignore=None)

    def fingerprint(self) -> str:
        """Changes with any picture's name or size and with the annotations' contents."""
        hashes = {}
        for subset, path in self._files.items():
            with path.open("rb") as file:
                hashes[subset] = hashlib.file_digest(file, "sha256").hexdigest().encode()
        return fingerprint_of(self.dataset, self._sizes, hashes)


def _annotation_file(subset: str) -> str:
    return f"annotations/instances_{subset}2014.json"


def _joined(annotations: list[_Annotation], classes: dict[int, int]) -> bytes:
    return joined((classes[a.category_id], a.id, a.segmentation) for a in sorted(annotations, key=lambda a: a.id))


def _check_unique(key: str, values: Iterable[int | str], where: str) -> None:
    seen: set[int | str] = set()
    for value in values:
        if value in seen:
            raise InputError(
                f"'{where}': expected one image with the {key} {value!r}, found two or more; keep the one that the "
                "annotations are of and remove the others"
            )
        seen.add(value)


def _check(annotation: _Annotation, images: dict[int | str, _Image], classes: dict[int, int], where: str) -> None:
    number = annotation.id
    if annotation.category_id not in classes:
        raise InputError(
            f"'{where}': annotation {number} has category {annotation.category_id}, "
            "which is not among the file's categories; add the category or remove the annotation"
        )
    image = images.get(annotation.image_id)
    if image is None:
        raise InputError(
            f"'{where}': annotation {number} is of image {annotation.image_id}, "
            "which is not among the file's images; add the image or remove the annotation"
        )
    if annotation.iscrowd:
        return
    check_segmentation(annotation.segmentation, (image.height, image.width), number, where)
