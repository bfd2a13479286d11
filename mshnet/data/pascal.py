"""The VOC 2012 layout: JPEGImages, SegmentationClassAug (0 background, 1..20, 255 ignored), ImageSets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mshnet.config import IGNORE_INDEX
from mshnet.data.folds import class_names
from mshnet.data.source import Folder, ImageRecord, LabelledImage, Source, fingerprint_of
from mshnet.errors import DatasetNotFoundError, InputError

IMAGES, MASKS, LISTS = "JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"


class VocSource(Source):
    """Reads `root`, `root/VOC2012` or `root/VOCdevkit/VOC2012`, whichever holds the layout."""

    mask_mode = "SegmentationClassAug labels, 255 ignored"

    def __init__(self, root: str, dataset: str = "pascal") -> None:
        self.root = root
        self.dataset = dataset

    def __reduce__(self) -> tuple[type[VocSource], tuple[str, str]]:
        return VocSource, (self.root, self.dataset)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 1..20, by class id 0..19."""
        return class_names(self.dataset)

    @cached_property
    def _folder(self) -> Folder:
        top = Folder(self.root)
        for inside in ("", "VOC2012", "VOCdevkit/VOC2012"):
            folder = top.below(inside)
            if not folder.has_dir(IMAGES):
                continue
            if not folder.has_dir(MASKS):
                raise DatasetNotFoundError(
                    f"no {MASKS} under '{folder.root}' (found {IMAGES}): build it from VOC's "
                    "SegmentationClass and SBD with "
                    f"`python -m mshnet.data.sbd --voc {folder.root} --sbd SBD_FOLDER`"
                )
            if not folder.has_file(f"{LISTS}/val.txt"):
                raise DatasetNotFoundError(
                    f"no {LISTS}/val.txt under '{folder.root}' (found {IMAGES}, {MASKS}): "
                    "it says which images are the validation images; take it from the VOC 2012 archive"
                )
            return folder
        raise DatasetNotFoundError(
            f"no VOC2012 under '{self.root}' (looked for {IMAGES}, {MASKS}, {LISTS} there, in VOC2012 and in "
            "VOCdevkit/VOC2012): give the folder that holds them"
        )

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {**self._folder.sizes(IMAGES), **self._folder.sizes(MASKS)}

    @cached_property
    def _lists(self) -> dict[str, bytes]:
        names = [f"{LISTS}/{name}.txt" for name in ("train", "trainaug", "val")]
        return {name: self._folder.read(name) for name in names if self._folder.has_file(name)}

    def check(self) -> None:
        """Raise DatasetNotFoundError where the layout is not there."""
        _ = self._folder

    def records(self) -> Iterator[ImageRecord]:
        """Every image with a mask; `val` are the ids of val.txt, `train` all others."""
        prefix = f"{MASKS}/"
        ids = sorted(p[len(prefix) : -4] for p in self._sizes if p.startswith(prefix) and p.endswith(".png"))
        if not ids:
            raise DatasetNotFoundError(f"no PNG masks in '{self._folder.path(MASKS)}': the folder is empty")
        known = set(ids)
        for name, text in self._lists.items():
            self._check_all_there(name, [i for i in _ids(text) if i not in known], f"{MASKS}/*.png")
        no_image = [i for i in ids if f"{IMAGES}/{i}.jpg" not in self._sizes]
        self._check_all_there(MASKS, no_image, f"{IMAGES}/*.jpg")
        val = set(_ids(self._lists[f"{LISTS}/val.txt"]))
        for image_id in ids:
            yield ImageRecord(
                image_id=image_id,
                subset="val" if image_id in val else "train",
                image_path=f"{IMAGES}/{image_id}.jpg",
                mask_path=f"{MASKS}/{image_id}.png",
            )

    def load(self, record: ImageRecord) -> LabelledImage:
        """One image with its class masks. InputError for a broken file, a misfit size or label."""
        image = self._folder.read_rgb(record.image_path)
        label = read_labels(self._folder, record.mask_path, len(self.class_names))
        if label.shape != image.shape[:2]:
            raise InputError(
                "mask and image must have one size: "
                f"'{record.mask_path}' is {label.shape[1]}×{label.shape[0]} px, "
                f"'{record.image_path}' is {image.shape[1]}×{image.shape[0]} px; replace the wrong file"
            )
        values = label_values(label, record.mask_path, len(self.class_names))
        masks = {v - 1: label == v for v in values}
        return LabelledImage(image=image, masks=masks, ignore=label == IGNORE_INDEX)

    def fingerprint(self) -> str:
        """Changes with any file's name or size and with the lists' contents."""
        return fingerprint_of(self.dataset, self._sizes, self._lists)

    def _check_all_there(self, what: str, missing: list[str], where: str) -> None:
        if missing:
            raise InputError(
                f"every image of {what} needs a file {where} under '{self._folder.root}': "
                f"{len(missing)} missing, first {missing[0]!r}; add them or shorten the list"
            )


def _ids(text: bytes) -> list[str]:
    return [line.split()[0] for line in text.decode().splitlines() if line.strip()]


def read_labels(
    folder: Folder, path: str, classes: int, modes: tuple[str, ...] = ("P", "L")
) -> UInt8[np.ndarray, "H W"]:
    """A label PNG's values, unchecked. InputError for a picture of another of Pillow's modes, such as colours."""
    picture = folder.read_image(path)
    if picture.mode not in modes:
        raise InputError(
            f"'{path}' must be a palette or grey PNG whose values are class labels, "
            f"got mode {picture.mode}; convert the colours to labels 0..{classes} and {IGNORE_INDEX}"
        )
    return np.array(picture, dtype=np.uint8)


def label_values(label: UInt8[np.ndarray, "H W"], path: str, classes: int) -> list[int]:
    """The classes' labels that occur, ascending. InputError for one that is none of 0..classes and 255."""
    values = np.flatnonzero(np.bincount(label.ravel(), minlength=256))
    wrong = values[(values > classes) & (values != IGNORE_INDEX)]
    if wrong.size:
        raise InputError(
            f"labels must be 0..{classes} or {IGNORE_INDEX}, "
            f"'{path}' has {', '.join(map(str, wrong[:5]))}; replace the mask"
        )
    return [int(v) for v in values if v not in (0, IGNORE_INDEX)]


def write_label(label: UInt8[np.ndarray, "H W"], path: Path) -> None:
    """Write a label map as VOC does: a PNG with the palette that shows each class in its colour."""
    picture = Image.fromarray(label)
    # A palette turns the grey picture into one of mode P, as VOC's are.
    picture.putpalette([_colour(value, channel) for value in range(256) for channel in range(3)])
    picture.save(path, format="PNG")


def _colour(value: int, channel: int) -> int:
    """VOC's palette: bits 0, 3, 6 of the label are red's highest bits, 1, 4, 7 green's, 2, 5 blue's."""
    return sum((value >> (3 * i + channel) & 1) << (7 - i) for i in range(3))
