"""The COCO 2014 layout: annotations/instances_{train,val}2014.json with train2014/ and val2014/."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Bool

from mshnet.data.filesystem import is_local
from mshnet.data.source import Folder, ImageRecord, LabelledImage, Source, fingerprint_of
from mshnet.data.temporary import temporary_room
from mshnet.errors import DatasetNotFoundError, InputError

CLASSES = 80
SUBSETS = ("train", "val")


_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
"""Of a category: it goes to reports, tables, charts and the tracker."""
_Pixels = Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class _Category(msgspec.Struct, gc=False):
    id: int
    name: _Name


class _Image(msgspec.Struct, gc=False):
    id: int | str
    file_name: str
    height: _Pixels
    width: _Pixels


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


class _Rle(msgspec.Struct):
    size: tuple[int, int]
    counts: list[int] | str


_Segmentation = list[list[float]] | _Rle
_segmentation = msgspec.json.Decoder(_Segmentation)
_of_record = msgspec.json.Decoder(list[tuple[int, int, _Segmentation]])
"""What a record keeps of its instances: (class id, annotation id, polygons or run lengths)."""


class CocoSource(Source):
    """`records` and `fingerprint` read the two instance files, `load` does not: a record holds its instances.

    The files are read through a memory map, remote ones from a temporary local copy.
    """

    dataset = "coco"
    mask_mode = "union of annToMask, crowds skipped"

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
        return {s: self._local(_annotation_file(s)) for s in SUBSETS}

    def _local(self, relative: str) -> Path:
        path = self._folder.path(relative)
        if is_local(self.root):
            return Path(path)
        # Without a name, so that a process that is killed leaves nothing of it.
        copy = tempfile.TemporaryFile()  # noqa: SIM115 closed with the source
        weakref.finalize(self, copy.close)
        local = f"/dev/fd/{copy.fileno()}"
        with temporary_room(f"a copy of '{self.root.rstrip('/')}/{relative}'"):
            self._folder.fs.get_file(path, local)
        return Path(local)

    def _where(self, subset: str) -> str:
        return f"{self.root.rstrip('/')}/{_annotation_file(subset)}"

    @cached_property
    def _categories(self) -> dict[int, str]:
        found = {}
        for subset, file in self._files.items():
            content = _decoded(file, _Categories, self._where(subset))
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
        content = _decoded(self._files[subset], _Instances, self._where(subset))
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
        by_class: dict[int, list[tuple[int, Any]]] = {}
        for class_id, annotation_id, segmentation in _of_record.decode(record.instances):
            by_class.setdefault(class_id, []).append((annotation_id, segmentation))
        masks = {c: _union(parts, record) for c, parts in sorted(by_class.items())}
        # An instance smaller than a pixel gives an empty mask: the image does not show the class.
        return LabelledImage(image=image, masks={c: m for c, m in masks.items() if m.any()}, ignore=None)

    def fingerprint(self) -> str:
        """Changes with any picture's name or size and with the annotations' contents."""
        hashes = {}
        for subset, path in self._files.items():
            with path.open("rb") as file:
                hashes[subset] = hashlib.file_digest(file, "sha256").hexdigest().encode()
        return fingerprint_of(self.dataset, self._sizes, hashes)


def _annotation_file(subset: str) -> str:
    return f"annotations/instances_{subset}2014.json"


def _decoded(file: Path, kind: Any, where: str) -> Any:
    with file.open("rb") as opened:
        if not file.stat().st_size:
            raise InputError(f"'{where}' is empty; fetch the file again")
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped with the last Raw that lies in it
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise InputError(f"'{where}' is not in COCO's instance format: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{where}' is not valid JSON: {error}; fetch the file again") from error


def _joined(annotations: list[_Annotation], classes: dict[int, int]) -> bytes:
    parts = [
        b"[%d,%d,%b]" % (classes[a.category_id], a.id, bytes(a.segmentation))
        for a in sorted(annotations, key=lambda a: a.id)
    ]
    return b"[%b]" % b",".join(parts)


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
    try:
        segmentation = _segmentation.decode(annotation.segmentation)
    except msgspec.ValidationError as error:
        raise InputError(
            f"'{where}': annotation {number} is neither polygons nor run lengths ({error}); mend or remove it"
        ) from error
    if isinstance(segmentation, list):
        _check_polygons(segmentation, image, number, where)
    else:
        _check_runs(segmentation, image, number, where)


def _check_polygons(polygons: list[list[float]], image: _Image, number: int, where: str) -> None:
    sizes = [len(polygon) for polygon in polygons] or [0]
    if min(sizes) < 6 or any(n % 2 for n in sizes):
        raise InputError(
            f"'{where}': annotation {number} has a polygon of {min(sizes) / 2:g} points, "
            "expected pairs of x and y, at least 3 points; mend or remove the annotation"
        )
    # pycocotools walks along the outline in memory, and ends the process where it does not fit.
    farthest = 2 * max(image.height, image.width)
    lowest, highest = min(map(min, polygons)), max(map(max, polygons))
    if lowest < -farthest or highest > farthest:
        raise InputError(
            f"'{where}': annotation {number} has a point at {lowest if lowest < -farthest else highest:g}, far outside "
            f"of its image of {image.width}×{image.height} px; mend or remove the annotation"
        )


def _check_runs(rle: _Rle, image: _Image, number: int, where: str) -> None:
    if rle.size != (image.height, image.width):
        raise InputError(
            f"mask and image must have one size: '{where}', annotation {number} has an RLE of size "
            f"{list(rle.size)}, its image is [{image.height}, {image.width}] (height, width)"
        )
    # pycocotools gives whatever lies in memory where runs do not fill the image.
    runs = rle.counts if isinstance(rle.counts, list) else _runs(rle.counts)
    if min(runs, default=-1) < 0 or sum(runs) != image.height * image.width:
        raise InputError(
            f"'{where}': annotation {number} has run lengths that do not make up the {image.height * image.width} "
            "pixels of its image; mend or remove the annotation"
        )


def _runs(text: str) -> list[int]:
    """The run lengths in COCO's compressed form; none where it is damaged."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= bits >> 4 << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [] if shift else runs


def _union(parts: list[tuple[int, Any]], record: ImageRecord) -> Bool[np.ndarray, "H W"]:
    """What `annToMask` gives for each instance, united (the same run-length code, nothing printed)."""
    from pycocotools import mask as rle_code

    runs: list[Any] = []
    for number, segmentation in parts:
        try:
            if isinstance(segmentation, list):
                runs += rle_code.frPyObjects(segmentation, record.height, record.width)
                continue
            rle = {"size": list(segmentation.size), "counts": segmentation.counts}
            runs.append(rle_code.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle)
        except (TypeError, ValueError) as error:
            raise InputError(f"annotation {number} of '{record.image_path}' has no readable mask: {error}") from error
    decoded: Bool[np.ndarray, "H W"] = rle_code.decode(rle_code.merge(runs)).astype(bool)
    return decoded
