"""Build SegmentationClassAug from VOC's own masks and SBD's: `python -m mshnet.data.sbd --voc DIR --sbd DIR`.

VOC 2012 labels 2,913 images; the Semantic Boundaries Dataset (SBD) labels 11,355 images of VOC, as .mat
files. The field trains on both: 12,031 masks, of which 10,582 for training ("trainaug") and VOC's 1,449 for
validation. Where both label an image, VOC's mask wins.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mshnet.data.pascal import IMAGES, LISTS, MASKS, write_label
from mshnet.data.source import FORMATS, opened_picture
from mshnet.errors import DatasetNotFoundError, InputError

VOC_MASKS = "SegmentationClass"
CLASSES = 20


@dataclass(frozen=True, kw_only=True)
class Built:
    """How many masks there are now, and where they came from."""

    masks: int
    from_voc: int
    from_sbd: int
    trainaug: int
    val: int


FULL = Built(masks=12031, from_voc=2913, from_sbd=9118, trainaug=10582, val=1449)
"""What the complete VOC 2012 and SBD give."""


def build_aug_masks(voc: Path, sbd: Path) -> Built:
    """Write SegmentationClassAug and ImageSets/Segmentation/trainaug.txt into the VOC folder.

    Existing files are kept; InputError where one has other content than this would write, and for missing
    folders, broken .mat files, labels out of range and masks of another size than their image.
    """
    from tqdm import tqdm

    voc_root = _find(voc, ("", "VOC2012", "VOCdevkit/VOC2012"), (IMAGES, VOC_MASKS, LISTS), "VOC 2012")
    sbd_root = _find(sbd, ("", "dataset", "benchmark_RELEASE/dataset"), ("cls",), "SBD")
    ours = {p.stem: p for p in sorted((voc_root / VOC_MASKS).glob("*.png"))}
    theirs = {p.stem: p for p in sorted((sbd_root / "cls").glob("*.mat")) if p.stem not in ours}
    val = _read_ids(voc_root / LISTS / "val.txt")
    _check_complete(voc_root, val, ours, theirs)
    train = sorted((ours.keys() | theirs.keys()) - val)
    list_path = voc_root / LISTS / "trainaug.txt"
    if list_path.exists() and _read_ids(list_path) != set(train):
        raise InputError(
            f"'{list_path}' exists and lists other images than the {len(train)} that VOC and SBD label here: "
            "move it away, or give the complete VOC and SBD"
        )
    (voc_root / MASKS).mkdir(exist_ok=True)
    for image_id in tqdm(sorted([*ours, *theirs]), desc=MASKS, unit="mask", disable=None):
        label = _read_png(ours[image_id]) if image_id in ours else _read_mat(theirs[image_id])
        _check_size(label, voc_root / IMAGES / f"{image_id}.jpg")
        _write_once(label, voc_root / MASKS / f"{image_id}.png")
    if not list_path.exists():
        _replace(list_path, lambda part: part.write_text("".join(f"{i}\n" for i in train)))
    return Built(
        masks=len(ours) + len(theirs),
        from_voc=len(ours),
        from_sbd=len(theirs),
        trainaug=len(train),
        val=len(val),
    )


def _find(root: Path, inside: tuple[str, ...], wanted: tuple[str, ...], what: str) -> Path:
    for place in inside:
        if all((root / place / w).is_dir() for w in wanted):
            return root / place
    raise DatasetNotFoundError(
        f"no {what} under '{root}' (looked for {', '.join(wanted)} there and in {', '.join(inside[1:])}): "
        "give the unpacked archive's folder"
    )


def _read_ids(path: Path) -> set[str]:
    if not path.is_file():
        raise DatasetNotFoundError(f"no '{path}': take it from the VOC 2012 archive")
    return set(path.read_text().split())


def _check_complete(voc_root: Path, val: set[str], ours: dict[str, Path], theirs: dict[str, Path]) -> None:
    unlabelled = sorted(val - ours.keys())
    if unlabelled:
        raise InputError(
            f"every image of val.txt needs its mask in '{voc_root / VOC_MASKS}': {len(unlabelled)} missing, "
            f"first {unlabelled[0]}; unpack the VOC 2012 archive again"
        )
    pictures = {p.stem for p in (voc_root / IMAGES).glob("*.jpg")}
    unseen = sorted((ours.keys() | theirs.keys()) - pictures)
    if unseen:
        raise InputError(
            f"every mask needs its image in '{voc_root / IMAGES}': {len(unseen)} missing, first {unseen[0]}; "
            "unpack the whole VOC 2012 archive (SBD's images are all in it)"
        )


def _read_png(path: Path) -> UInt8[np.ndarray, "H W"]:
    try:
        with opened_picture(path.read_bytes()) as picture:
            label = np.array(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot decode '{path}': {error}; unpack the archive again") from error
    return _checked(label, path, {255})


def _read_mat(path: Path) -> UInt8[np.ndarray, "H W"]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        label = np.asarray(loadmat(str(path))["GTcls"]["Segmentation"][0, 0])
    except (MatReadError, OSError, ValueError, TypeError, KeyError, IndexError, zlib.error) as error:
        raise InputError(
            f"cannot read GTcls.Segmentation of '{path}': {type(error).__name__} {error}; unpack SBD again"
        ) from error
    return _checked(label, path, set())


def _checked(label: np.ndarray, path: Path, extra: set[int]) -> UInt8[np.ndarray, "H W"]:
    wrong = [int(v) for v in np.unique(label) if not (0 <= v <= CLASSES or int(v) in extra)]
    if label.ndim != 2 or wrong:
        found = f"values {wrong[:5]}" if label.ndim == 2 else f"{label.ndim} dimensions (a colour picture?)"
        raise InputError(f"'{path}' must be a map of labels 0..{CLASSES}, found {found}; replace it")
    return label.astype(np.uint8)


def _check_size(label: UInt8[np.ndarray, "H W"], image_path: Path) -> None:
    try:
        with Image.open(image_path, formats=FORMATS) as picture:  # reads the header only
            width, height = picture.size
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot decode '{image_path}': {error}; unpack the archive again") from error
    if label.shape != (height, width):
        raise InputError(
            f"mask and image must have one size: '{image_path}' is {width}×{height} px, "
            f"its mask {label.shape[1]}×{label.shape[0]} px; replace the wrong file"
        )


def _write_once(label: UInt8[np.ndarray, "H W"], path: Path) -> None:
    if path.exists():
        if not np.array_equal(_read_png(path), label):
            raise InputError(f"'{path}' exists with other labels than VOC and SBD give: move it away first")
        return
    _replace(path, lambda part: write_label(label, part))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target and rename, so that a killed run leaves no half file under the final name."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def main(voc: Path, sbd: Path) -> None:
    """Build SegmentationClassAug (VOC's masks, and SBD's where VOC has none) and the trainaug list.

    Args:
        voc: Folder of VOC 2012: with JPEGImages, SegmentationClass, ImageSets, or above VOCdevkit.
        sbd: Folder of SBD: with cls/*.mat, or above benchmark_RELEASE/dataset.
    """
    built = build_aug_masks(voc, sbd)
    if built != FULL:
        print(f"note: the complete archives give {asdict(FULL)}", file=sys.stderr)
    print(json.dumps(asdict(built)))


if __name__ == "__main__":
    from mshnet.command_line import run

    run(main, "python -m mshnet.data.sbd")
