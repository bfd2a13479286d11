"""One's own data as label PNGs (`--dataset voc`): a folder of pictures, one of masks, and a list of the classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import msgspec
import numpy as np
from jaxtyping import Bool

from mshnet.config import IGNORE_INDEX
from mshnet.data.annotated_size import read_as_annotated
from mshnet.data.class_choice import ChosenClasses, read_class_choice
from mshnet.data.filesystem import filesystem
from mshnet.data.listed import is_picture, paired, read_class_list, unlabelled
from mshnet.data.own import OwnData
from mshnet.data.pascal import label_values, read_labels
from mshnet.data.source import Folder, ImageRecord, LabelledImage, Source, fingerprint_of, refuse
from mshnet.errors import DatasetNotFoundError, InputError


class LabelPngSource(Source):
    """`SUB/NAME.png` below the masks labels `SUB/NAME.jpg` (or another picture) below the images.

    Values are 0 background, n the class in line n of the class list, 255 ignored. An image id is the picture's path
    below the folder of images. All records are of subset `train`. Both may lie in one folder, where PNGs are masks.
    """

    dataset = "voc"
    mask_mode = "label PNGs, 255 ignored"

    def __init__(self, root: str, own: OwnData) -> None:
        self.root = own.images or root
        self.own = own
        if not self.root or not own.masks or not own.class_list:
            raise InputError(
                "dataset voc needs --images FOLDER, --masks FOLDER and --class-list FILE, got "
                f"images {self.root!r}, masks {own.masks!r}, class list {own.class_list!r}"
            )

    def __reduce__(self) -> tuple[type[LabelPngSource], tuple[str, OwnData]]:
        return LabelPngSource, (self.root, self.own)

    def check(self) -> None:
        """Raise DatasetNotFoundError where a folder or the list is not there, InputError for bad lists of classes."""
        for folder, what, flag in ((self._folder, "pictures", "images"), (self._masks, "label PNGs", "masks")):
            if not folder.has_dir(""):
                raise DatasetNotFoundError(f"expected a folder of {what} at '{folder.root}', found none (--{flag})")
        _ = self._chosen

    @cached_property
    def _folder(self) -> Folder:
        return Folder(self.root)

    @cached_property
    def _masks(self) -> Folder:
        return Folder(self.own.masks)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        fs, path = filesystem(self.own.class_list)
        try:
            text = bytes(fs.cat_file(path))
        except (FileNotFoundError, IsADirectoryError) as error:
            message = f"expected a class list at '{self.own.class_list}', found none (--class-list)"
            raise DatasetNotFoundError(message) from error
        return read_class_list(text, self.own.class_list)

    @cached_property
    def _chosen(self) -> ChosenClasses:
        return read_class_choice(self.own.classes).apply(self._names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id."""
        return self._chosen.names

    @cached_property
    def _mask_sizes(self) -> dict[str, int]:
        return {path: size for path, size in self._masks.sizes("").items() if path.lower().endswith(".png")}

    @cached_property
    def _picture_sizes(self) -> dict[str, int]:
        """Without the masks, which may lie in the same folder or in one below."""
        images, masks = (f"{folder.path('').rstrip('/')}/" for folder in (self._folder, self._masks))
        below = masks.removeprefix(images) if masks.startswith(images) else None
        found = {path: size for path, size in self._folder.sizes("").items() if is_picture(path)}
        if below == "":
            return {path: size for path, size in found.items() if not path.lower().endswith(".png")}
        return {path: size for path, size in found.items() if below is None or not path.startswith(below)}

    def records(self) -> Iterator[ImageRecord]:
        """Every picture with a mask."""
        return self.usable_records(refuse)

    def usable_records(self, problem: Callable[[str], None]) -> Iterator[ImageRecord]:
        """As `records`; what cannot be used is told to `problem` and left out."""
        self.check()
        if not self._mask_sizes:
            raise DatasetNotFoundError(f"expected label PNGs in '{self._masks.root}', found none (--masks)")
        for picture, mask in paired(self._picture_sizes, self._mask_sizes, self.root, problem):
            yield ImageRecord(image_id=picture, subset="train", image_path=picture, mask_path=mask)

    def remarks(self) -> tuple[str, ...]:
        """How many pictures have no mask."""
        labelled = sum(1 for _ in self.usable_records(lambda _: None))
        return unlabelled(len(self._picture_sizes) - labelled, "label PNG")

    def load(self, record: ImageRecord) -> LabelledImage:
        """One image with its class masks. InputError for a broken file, a misfit size or label."""
        # A PNG of one bit has the labels 0 and 1.
        label = read_labels(self._masks, record.mask_path, len(self._names), ("P", "L", "1"))
        height, width = label.shape
        image, notes = read_as_annotated(self._folder, record.image_path, (height, width), "the labels")
        values = label_values(label, record.mask_path, len(self._names))
        masks: dict[int, Bool[np.ndarray, "H W"]] = {}
        for value in values:
            class_id = self._chosen.class_of[value - 1]
            if class_id is not None:
                masks[class_id] = masks.get(class_id, False) | (label == value)
        ignore = label == IGNORE_INDEX
        if not values and ignore.any():
            notes += ("no label but 255, which is ignored: of a black and white mask make the white 1",)
        return LabelledImage(image=image, masks=dict(sorted(masks.items())), ignore=ignore, notes=notes)

    def fingerprint(self) -> str:
        """Changes with any picture's or mask's name or size and with the classes, listed or chosen."""
        self.check()
        sizes = {f"images/{path}": size for path, size in self._picture_sizes.items()}
        sizes |= {f"masks/{path}": size for path, size in self._mask_sizes.items()}
        return fingerprint_of(self.dataset, sizes, {"classes": msgspec.json.encode((self._names, self._chosen))})
