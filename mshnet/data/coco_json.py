"""One's own data in COCO's instance format: one JSON file with any categories, and a folder of pictures."""

from __future__ import annotations

import hashlib
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import msgspec

from mshnet.data.annotated_size import read_as_annotated
from mshnet.data.class_choice import ChosenClasses, read_class_choice
from mshnet.data.filesystem import filesystem
from mshnet.data.instances import MASK_MODE, Name, Pixels, check_segmentation, decoded, joined, mappable, masks_of
from mshnet.data.listed import is_picture
from mshnet.data.own import OwnData
from mshnet.data.source import Folder, ImageRecord, LabelledImage, Source, fingerprint_of, refuse
from mshnet.errors import DatasetNotFoundError, InputError

_Id = int | float | str
"""Some programs write 7.0 or "7" for 7; `_key` makes them one."""


class _Category(msgspec.Struct, gc=False):
    id: _Id
    name: Name


class _Image(msgspec.Struct, gc=False):
    id: _Id
    file_name: str
    height: Pixels
    width: Pixels


class _Annotation(msgspec.Struct, gc=False):
    image_id: _Id
    category_id: _Id
    segmentation: msgspec.Raw = msgspec.Raw(b"null")
    """Left as text: polygons as Python numbers would take five times the file's size."""
    iscrowd: int | bool = 0
    id: _Id | None = None


class _Categories(msgspec.Struct):
    categories: list[_Category]


class _Images(msgspec.Struct):
    images: list[_Image]


class _Instances(msgspec.Struct):
    categories: list[_Category]
    images: list[_Image]
    annotations: list[_Annotation]


class CocoJsonSource(Source):
    """Class ids are the positions in ascending category id, after the class file's choice. Reads as `CocoSource` does.

    An image id is the file's path below the folder of pictures. All records are of subset `train`.
    """

    dataset = "coco-json"
    mask_mode = MASK_MODE

    def __init__(self, root: str, own: OwnData) -> None:
        self.root = own.images or root
        self.own = own
        if not self.root or not own.annotations:
            raise InputError("dataset coco-json needs --images FOLDER and --annotations FILE.json, got no such")

    def __reduce__(self) -> tuple[type[CocoJsonSource], tuple[str, OwnData]]:
        return CocoJsonSource, (self.root, self.own)

    def check(self) -> None:
        """Raise DatasetNotFoundError where the folder or the file is not there, InputError for a bad class file."""
        if not self._folder.has_dir(""):
            raise DatasetNotFoundError(f"expected a folder of pictures at '{self.root}', found none (--images)")
        fs, path = filesystem(self.own.annotations)
        if not fs.isfile(path):
            raise DatasetNotFoundError(f"expected a JSON file at '{self.own.annotations}', found none (--annotations)")
        read_class_choice(self.own.classes)

    @cached_property
    def _folder(self) -> Folder:
        return Folder(self.root)

    @cached_property
    def _file(self) -> Path:
        self.check()
        return mappable(self.own.annotations, self)

    @cached_property
    def _categories(self) -> dict[str, str]:
        """Names by key, in ascending category id."""
        found: list[_Category] = decoded(self._file, _Categories, self.own.annotations).categories
        names: dict[str, str] = {}
        for category in sorted(found, key=lambda c: _order(_key(c.id))):
            if names.setdefault(_key(category.id), category.name) != category.name:
                raise InputError(
                    f"'{self.own.annotations}': expected one category with the id {category.id!r}, found "
                    f"{names[_key(category.id)]!r} and {category.name!r}; give each an id of its own"
                )
        if not names:
            raise InputError(f"'{self.own.annotations}': expected categories, found none; export them with the file")
        return names

    @cached_property
    def _chosen(self) -> ChosenClasses:
        return read_class_choice(self.own.classes).apply(tuple(self._categories.values()))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id."""
        return self._chosen.names

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self._folder.sizes("")

    @cached_property
    def _files(self) -> Callable[[str], str]:
        return _finder(self._sizes)

    def records(self) -> Iterator[ImageRecord]:
        """Every image with at least one annotation of a chosen class that is not a crowd."""
        return self.usable_records(refuse)

    def usable_records(self, problem: Callable[[str], None]) -> Iterator[ImageRecord]:
        """As `records`; what cannot be used is told to `problem` and left out."""
        content: _Instances = decoded(self._file, _Instances, self.own.annotations)
        images = self._images(content.images, problem)
        instances: dict[str, list[tuple[int, int | str, msgspec.Raw]]] = {}
        class_of = dict(zip(self._categories, self._chosen.class_of, strict=True))
        for position, annotation in enumerate(content.annotations):
            try:
                instance = self._instance(position, annotation, images, class_of)
            except InputError as error:
                problem(str(error))
                continue
            if instance is not None:
                instances.setdefault(_key(annotation.image_id), []).append(instance)
        missing = [images[key].file_name for key in instances if images[key].file_name not in self._sizes]
        if missing:
            problem(self._missing(missing))
        there = sorted((images[key].file_name, key) for key in instances if images[key].file_name in self._sizes)
        for path, key in there:
            yield ImageRecord(
                image_id=path,
                subset="train",
                image_path=path,
                height=images[key].height,
                width=images[key].width,
                instances=joined(instances[key]),
            )

    def remarks(self) -> tuple[str, ...]:
        """Images without an annotation, crowds, categories without any, and pictures that the file does not name."""
        content: _Instances = decoded(self._file, _Instances, self.own.annotations)
        shown = {_key(a.image_id) for a in content.annotations}
        bare = sum(_key(image.id) not in shown for image in content.images)
        crowds = sum(bool(a.iscrowd) for a in content.annotations)
        used = {_key(a.category_id) for a in content.annotations}
        empty = [name for key, name in self._categories.items() if key not in used]
        which = ", ".join(map(repr, empty[:10]))
        named = {self._files(image.file_name) for image in content.images}
        others = sum(is_picture(path) and path not in named for path in self._sizes)
        found = (
            (bare, f"{bare:,} image(s) of the JSON have no annotation and take no part"),
            (crowds, f"{crowds:,} annotation(s) of crowds are skipped"),
            (len(empty), f"{len(empty):,} of {len(self._categories):,} categories have no annotation: {which}"),
            (others, f"{others:,} picture(s) of the folder are not in the JSON"),
        )
        return tuple(text for count, text in found if count)

    def _images(self, found: list[_Image], problem: Callable[[str], None]) -> dict[str, _Image]:
        """By key, their names those of files where there are such."""
        images: dict[str, _Image] = {}
        names: set[str] = set()
        for image in found:
            image.file_name = self._files(image.file_name)
            key = _key(image.id)
            for what, value, known in (
                ("id", image.id, key in images),
                ("file_name", image.file_name, image.file_name in names),
            ):
                if known:
                    problem(
                        f"'{self.own.annotations}': expected one image with the {what} {value!r}, found two or more; "
                        "keep the one that the annotations are of and remove the others"
                    )
            if key not in images and image.file_name not in names:
                images[key] = image
                names.add(image.file_name)
        return images

    def _instance(
        self, position: int, annotation: _Annotation, images: Mapping[str, _Image], class_of: Mapping[str, int | None]
    ) -> tuple[int, int | str, msgspec.Raw] | None:
        """(class id, annotation id, segmentation), None for a crowd and for a class that is left out."""
        number = position if annotation.id is None else _key(annotation.id)
        where = self.own.annotations
        if _key(annotation.category_id) not in class_of:
            raise InputError(
                f"'{where}': annotation {number} has category {annotation.category_id!r}, "
                "which is not among the file's categories; add the category or remove the annotation"
            )
        image = images.get(_key(annotation.image_id))
        if image is None:
            raise InputError(
                f"'{where}': annotation {number} is of image {annotation.image_id!r}, "
                "which is not among the file's images; add the image or remove the annotation"
            )
        class_id = class_of[_key(annotation.category_id)]
        if annotation.iscrowd or class_id is None:
            return None
        if bytes(annotation.segmentation) in (b"null", b"[]"):
            raise InputError(
                f"'{where}': annotation {number} of '{image.file_name}' has no mask (a box alone?), expected polygons "
                "or run lengths; export the file with segmentations or remove the annotation"
            )
        check_segmentation(annotation.segmentation, (image.height, image.width), number, where)
        return class_id, number, annotation.segmentation

    def _missing(self, missing: list[str]) -> str:
        first = min(missing)
        same = sorted(path for path in self._sizes if posixpath.basename(path) == posixpath.basename(first))
        hint = f"there is '{same[0]}': give --images the folder from which file_name counts" if same else ""
        return (
            f"every annotated image needs its file under '{self.root}': {len(missing)} missing, first {first!r}; "
            f"{hint or 'fetch them or leave them out of the JSON'}"
        )

    def load(self, record: ImageRecord) -> LabelledImage:
        """One image with the union of its instances per class. InputError for a broken or misfit file."""
        size = (record.height, record.width)
        image, notes = read_as_annotated(self._folder, record.image_path, size, "the annotations")
        return LabelledImage(image=image, masks=masks_of(record), ignore=None, notes=notes)

    def fingerprint(self) -> str:
        """Changes with any named picture's name or size, with the annotations' contents and with the chosen classes."""
        with self._file.open("rb") as file:
            annotations = hashlib.file_digest(file, "sha256").hexdigest().encode()
        found: list[_Image] = decoded(self._file, _Images, self.own.annotations).images
        named = {self._files(image.file_name) for image in found}
        sizes = {path: size for path, size in self._sizes.items() if path in named}
        chosen = msgspec.json.encode((self._chosen.names, self._chosen.class_of))
        return fingerprint_of(self.dataset, sizes, {"annotations": annotations, "classes": chosen})


def _key(value: _Id) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _order(key: str) -> tuple[bool, int, str]:
    """Numbers by value, then words."""
    number = key.removeprefix("-").isdecimal()
    return not number, int(key) if number else 0, key


def _finder(sizes: Mapping[str, int]) -> Callable[[str], str]:
    """From a name in the JSON to the file's, which may differ in `/`, in a `./` before it or in how accents lie."""
    forms = {unicodedata.normalize("NFC", path): path for path in sizes}

    def find(name: str) -> str:
        if name in sizes:
            return name
        plain = posixpath.normpath(name.replace("\\", "/"))
        return plain if plain in sizes else forms.get(unicodedata.normalize("NFC", plain), name)

    return find
