"""What every reader of labelled images gives, and the file access that the readers share (any fsspec URI)."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from mshnet.data.filesystem import filesystem
from mshnet.data.folds import DATASETS
from mshnet.data.own import OwnData
from mshnet.errors import DatasetNotFoundError, InputError


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """All that is known of an image before its files are opened: with it, `load` needs no list and no annotations."""

    image_id: str
    """As in the field's lists: `2007_000033` (Pascal), `val2014/COCO_val2014_000000507081.jpg` (COCO); of one's own
    data the path below the folder of pictures."""
    subset: str
    """`train` or `val`; one's own data has `train` alone."""
    image_path: str
    """Relative to the source's root."""
    mask_path: str = ""
    """Relative to the source's root (voc: to its folder of masks); empty where masks come from annotations (COCO)."""
    height: int = 0
    """Original size in pixels as the annotations say; 0 where nothing says it before the file is opened."""
    width: int = 0
    instances: bytes = b""
    """What the masks are made of, in the reader's own JSON; empty where they are files."""


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image at its original size with one mask per class that it shows (masks of classes may overlap)."""

    image: UInt8[np.ndarray, "H W 3"]
    masks: dict[int, Bool[np.ndarray, "H W"]]
    ignore: Bool[np.ndarray, "H W"] | None
    """Pixels left out of the metric (Pascal's 255); None where the data set has no such label."""
    notes: tuple[str, ...] = ()
    """What was decided about it that a person may want to look at, in words."""


class Source(ABC):
    """A labelled data set. Picklable and cheap to construct; reads nothing before it is asked."""

    root: str
    """Local folder or fsspec URI."""
    dataset: str
    """As `open_source` takes it."""
    mask_mode: str
    """How masks follow from the files; recorded beside every number."""

    @abstractmethod
    def check(self) -> None:
        """A quick look whether the layout is there. Raises DatasetNotFoundError, naming what was looked for."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """By class id."""

    @abstractmethod
    def records(self) -> Iterator[ImageRecord]:
        """All images with a label, sorted by image id. InputError where files do not fit together."""

    def usable_records(self, problem: Callable[[str], None]) -> Iterator[ImageRecord]:
        """As `records`; what cannot be used is told to `problem` in words and left out, as far as a reader can."""
        try:
            yield from self.records()
        except InputError as error:
            problem(str(error))

    def remarks(self) -> tuple[str, ...]:
        """What the files hold that is left aside and is no fault, in words."""
        return ()

    @abstractmethod
    def load(self, record: ImageRecord) -> LabelledImage:
        """Read one image. InputError, naming the file, where it cannot be used."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) over sorted (path, size) and the contents of list and annotation files."""


def refuse(problem: str) -> NoReturn:
    """For `usable_records`: raise InputError at the first."""
    raise InputError(problem)


def open_source(dataset: str, root: str, own: OwnData | None = None) -> Source:
    """The reader for a data set under a local folder or any fsspec URI; nothing is looked at yet.

    One's own data (coco-json, voc, fss) lies where `own` says, or under the root where that says nothing.
    """
    if dataset == "coco":
        from mshnet.data.coco import CocoSource

        return CocoSource(root)
    if dataset in ("pascal", "shapes"):
        from mshnet.data.pascal import VocSource

        return VocSource(root, dataset)
    if dataset == "coco-json":
        from mshnet.data.coco_json import CocoJsonSource

        return CocoJsonSource(root, own or OwnData())
    if dataset == "voc":
        from mshnet.data.label_png import LabelPngSource

        return LabelPngSource(root, own or OwnData())
    if dataset == "fss":
        from mshnet.data.fss import FssSource

        return FssSource(root, own or OwnData())
    raise InputError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}; one's own: coco-json, voc, fss")


MOST_PIXELS = 100_000_000
"""Of a picture: a file of some kilobytes can claim any number, and decoding it takes 3 bytes and more for each."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Of pictures. Pillow knows some forty more, of which one (EPS) starts another program."""


def opened_picture(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A picture whose header alone was read. Raises OSError, SyntaxError or ValueError where it cannot be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a limit of our own
            picture = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    if picture.width * picture.height > MOST_PIXELS:
        raise ValueError(f"expected {MOST_PIXELS:,} pixels at most, found {picture.width}×{picture.height}")
    return picture


class Folder:
    """Read access below one root: a local folder or any fsspec URI. Pickles as its root alone."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.fs, self._base = filesystem(root)
        self._base = self._base.rstrip("/")

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.root,)

    def path(self, relative: str) -> str:
        """The file system's own name of a path below the root. InputError for one that would lead out of it."""
        if relative.startswith("/") or "\0" in relative or ".." in relative.split("/"):
            raise InputError(f"expected the name of a file below '{self.root}', found {relative!r}; rename it")
        return f"{self._base}/{relative}" if relative else self._base

    def has_dir(self, relative: str) -> bool:
        """Whether a folder (on object storage: any key below it) exists."""
        return bool(self.fs.isdir(self.path(relative)))

    def has_file(self, relative: str) -> bool:
        """Whether a file exists."""
        return bool(self.fs.isfile(self.path(relative)))

    def below(self, relative: str) -> Folder:
        """The folder one or more levels down."""
        return Folder(f"{self.root.rstrip('/')}/{relative}") if relative else self

    def sizes(self, relative: str) -> dict[str, int]:
        """Size in bytes of each file in a folder, by path relative to the root; hidden files are left out."""
        found = self.fs.find(self.path(relative), detail=True)
        inside = {name[len(self._base) + 1 :]: int(info["size"]) for name, info in found.items()}
        return {name: inside[name] for name in sorted(inside) if not name.rsplit("/", 1)[-1].startswith(".")}

    def read(self, relative: str) -> bytes:
        """A file's bytes. DatasetNotFoundError when it is not there."""
        try:
            return bytes(self.fs.cat_file(self.path(relative)))
        except FileNotFoundError as error:
            raise DatasetNotFoundError(f"no file '{relative}' under '{self.root}'") from error

    def read_image(self, relative: str) -> Image.Image:
        """A decoded picture. InputError naming the file when it is truncated, too large or no picture at all."""
        data = self.read(relative)
        try:
            picture = opened_picture(data)
            picture.load()
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's three ways to say "broken"
            raise InputError(
                f"cannot decode '{relative}' under '{self.root}' ({len(data)} bytes): {error}; fetch the file again"
            ) from error
        return picture

    def read_rgb(self, relative: str) -> UInt8[np.ndarray, "H W 3"]:
        """A picture as 8-bit RGB in stored orientation (annotations refer to it, not to EXIF's)."""
        return np.array(self.read_image(relative).convert("RGB"), dtype=np.uint8)


def fingerprint_of(dataset: str, sizes: Mapping[str, int], contents: Mapping[str, bytes]) -> str:
    """SHA-256 over a data set's file names, sizes and the given files' contents; the root does not enter."""
    facts = {
        "dataset": dataset,
        "sizes": sorted(sizes.items()),
        "contents": sorted((name, hashlib.sha256(data).hexdigest()) for name, data in contents.items()),
    }
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()
