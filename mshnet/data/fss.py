"""FSS-1000's layout (`--dataset fss`): a folder per class, in it pictures N.jpg with masks N.png, white on black.

1,000 classes with ten images each, one class per image. Li et al., "FSS-1000: A 1000-Class Dataset for Few-Shot
Segmentation", CVPR 2020. Any folder so arranged will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import msgspec
import numpy as np

from mshnet.data.annotated_size import read_as_annotated
from mshnet.data.class_choice import ChosenClasses, read_class_choice
from mshnet.data.listed import is_picture, paired, unlabelled
from mshnet.data.own import OwnData
from mshnet.data.source import Folder, ImageRecord, LabelledImage, Source, fingerprint_of, refuse
from mshnet.errors import DatasetNotFoundError, InputError

INSIDE = "fewshot_data"
"""The archive's folder of the classes."""
WHITE = 128
"""Grey values from here are the object, as in the published loaders."""


class FssSource(Source):
    """Reads the root or its `fewshot_data`. Classes are the folders' names, in ascending order.

    An image id is the picture's path: `CLASS/N.jpg`. All records are of subset `train`. A record holds its class id, so
    that `load` lists nothing.
    """

    dataset = "fss"
    mask_mode = f"grey {WHITE} and above is the object"

    def __init__(self, root: str, own: OwnData) -> None:
        self.root = own.images or root
        self.own = own
        if not self.root:
            raise InputError("dataset fss needs --images FOLDER (in it a folder per class), got none")

    def __reduce__(self) -> tuple[type[FssSource], tuple[str, OwnData]]:
        return FssSource, (self.root, self.own)

    def check(self) -> None:
        """Raise DatasetNotFoundError where the folder is not there, InputError for a bad class file."""
        _ = self._folder
        read_class_choice(self.own.classes)

    @cached_property
    def _folder(self) -> Folder:
        top = Folder(self.root)
        if not top.has_dir(""):
            raise DatasetNotFoundError(f"expected a folder with a folder per class at '{self.root}', found none")
        return top.below(INSIDE) if top.has_dir(INSIDE) else top

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Of `CLASS/NAME`; what lies elsewhere is none of the data."""
        sizes = self._folder.sizes("")
        return {path: size for path, size in sizes.items() if path.count("/") == 1 and is_picture(path)}

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """Those folders that hold a mask."""
        found = sorted({path.split("/")[0] for path in self._sizes if path.lower().endswith(".png")})
        if not found:
            raise DatasetNotFoundError(
                f"expected CLASS/N.jpg with CLASS/N.png under '{self._folder.root}', found no such PNG"
            )
        for name in found:
            if len(name) > 100 or not name.isprintable():
                raise InputError(
                    f"expected folders named as classes, 100 characters at most, found {name!r}; rename it"
                )
        return tuple(found)

    @cached_property
    def _chosen(self) -> ChosenClasses:
        return read_class_choice(self.own.classes).apply(self._classes)

    @cached_property
    def _class_of(self) -> dict[str, int | None]:
        return dict(zip(self._classes, self._chosen.class_of, strict=True))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id."""
        return self._chosen.names

    def records(self) -> Iterator[ImageRecord]:
        """Every picture with a mask whose class is not left out."""
        return self.usable_records(refuse)

    def usable_records(self, problem: Callable[[str], None]) -> Iterator[ImageRecord]:
        """As `records`; what cannot be used is told to `problem` and left out."""
        classes = self._class_of
        masks = [path for path in self._sizes if path.lower().endswith(".png")]
        pictures = self._sizes.keys() - set(masks)
        for picture, mask in paired(pictures, masks, self._folder.root, problem):
            class_id = classes[picture.split("/")[0]]
            if class_id is not None:
                yield ImageRecord(
                    image_id=picture,
                    subset="train",
                    image_path=picture,
                    mask_path=mask,
                    instances=b"%d" % class_id,
                )

    def remarks(self) -> tuple[str, ...]:
        """How many pictures have no mask."""
        masks = [path for path in self._sizes if path.lower().endswith(".png")]
        pictures = self._sizes.keys() - set(masks)
        labelled = sum(1 for _ in paired(pictures, masks, self._folder.root, lambda _: None))
        return unlabelled(len(pictures) - labelled, "mask")

    def load(self, record: ImageRecord) -> LabelledImage:
        """One image with the mask of its class. InputError for a broken file, a misfit size or labels for grey."""
        grey = np.array(self._folder.read_image(record.mask_path).convert("L"), dtype=np.uint8)
        height, width = grey.shape
        image, notes = read_as_annotated(self._folder, record.image_path, (height, width), "the labels")
        mask = grey >= WHITE
        if not mask.any() and grey.any():
            raise InputError(
                f"'{record.mask_path}' must be white (255) where the object is, its brightest pixel has {grey.max()}; "
                "replace the mask"
            )
        if not mask.any():
            notes += ("its mask shows no object",)
        masks = {int(record.instances): mask} if mask.any() else {}
        return LabelledImage(image=image, masks=masks, ignore=None, notes=notes)

    def fingerprint(self) -> str:
        """Changes with any file's name or size and with the chosen classes."""
        return fingerprint_of(self.dataset, self._sizes, {"classes": msgspec.json.encode(self._chosen)})
