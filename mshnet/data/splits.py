"""Which (image, class) pairs a fold trains on and is tested on: the field's list files, or a rule."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from mshnet.data.folds import FOLDS, Partition, published_partition
from mshnet.data.source import Folder
from mshnet.errors import DatasetNotFoundError, InputError

Pair = tuple[str, int]
"""(image id, class id): the image shows enough of the class to be its query or support."""

MIN_OBJECT_PX = 2048
"""Papers' rule for pairs, in pixels of the class at original size: 2 * 32 * 32."""


@dataclass(frozen=True, kw_only=True)
class SplitLists:
    """A fold's pairs. Images of `train` may still show novel classes: see `without_novel`."""

    fold: int
    train: tuple[Pair, ...]
    """Base classes only, in file order."""
    val: tuple[Pair, ...]
    """Novel classes only, in file order (the published Pascal episodes walk it)."""
    origin: str
    """Where they are from: `lists:<first 12 of the files' SHA-256>` or `rule: at least 2048 px`; of one's own data
    with the folds: `rule: at least 2048 px; 3 folds by frequency, seed 0`."""


def read_split_lists(dataset: str, root: str, fold: int) -> SplitLists:
    """The field's lists (HSNet's layout): `trn/` and `val/` under `root/<dataset>` or under `root` itself.

    Pascal: `foldF.txt` with `image__class` lines, classes 1-based; trn/foldF.txt holds fold F's own
    classes, so that a fold trains on the other three files. COCO: `foldF.pkl` or `foldF.json`, class ->
    images, where trn/foldF already holds the base classes. Pickles are read without executing anything.
    """
    partition = published_partition(dataset)
    novel, base = partition.tested(fold), partition.base(fold)
    folder = _list_folder(dataset, root)
    digest = hashlib.sha256()
    if dataset == "coco":
        train = _coco_pairs(folder, f"trn/fold{fold}", base, digest)
        val = _coco_pairs(folder, f"val/fold{fold}", novel, digest)
    else:
        train = [
            pair
            for other in range(FOLDS)
            if other != fold
            for pair in _pascal_pairs(folder, f"trn/fold{other}.txt", partition.tested(other), digest)
        ]
        val = _pascal_pairs(folder, f"val/fold{fold}.txt", novel, digest)
    origin = f"lists:{digest.hexdigest()[:12]}"
    return SplitLists(fold=fold, train=tuple(train), val=tuple(val), origin=origin)


def derive_split_lists(
    dataset: str,
    fold: int,
    images: Iterable[tuple[str, str, Mapping[int, int]]],
    min_object_px: int = MIN_OBJECT_PX,
) -> SplitLists:
    """Pairs by rule from (image id, subset, class id -> pixels at original size); in image order.

    Base classes from the images of `train`, novel classes from those of `val`.
    """
    partition = published_partition(dataset)
    train: list[Pair] = []
    val: list[Pair] = []
    for image_id, subset, pixels in images:
        if subset not in ("train", "val"):
            raise InputError(f"subset of image {image_id!r} must be train or val, got {subset!r}")
        (train if subset == "train" else val).extend((image_id, c) for c in _large(pixels, min_object_px))
    return _lists(partition, fold, train, val, _rule(min_object_px))


def own_split_lists(
    partition: Partition,
    fold: int,
    images: Iterable[tuple[str, str, Mapping[int, int]]],
    min_object_px: int = MIN_OBJECT_PX,
    *,
    divided: bool = False,
) -> SplitLists:
    """Pairs by rule of one's own data, which has no subsets; `images` as in `derive_split_lists`, in image order.

    Undivided, every image gives both kinds of pairs, and it is for `without_novel` to take what shows a novel class
    out of the training: no image is trained and tested on then. `divided`, for training on images that show novel
    classes: one image in three is for the test, by a hash of its id, and the others are for training.
    """
    train: list[Pair] = []
    val: list[Pair] = []
    for image_id, _, pixels in images:
        pairs = [(image_id, c) for c in _large(pixels, min_object_px)]
        for_test = is_for_test(image_id)
        if not (divided and for_test):
            train += pairs
        if not divided or for_test:
            val += pairs
    parts = "; a third of the images for the test, by a hash of their names" if divided else ""
    return _lists(partition, fold, train, val, f"{_rule(min_object_px)}; {partition.origin}{parts}")


def is_for_test(image_id: str) -> bool:
    """Whether an image of one's own data is for the test, where images are divided: one in three is."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") % 3 == 0


def without_novel(
    pairs: Sequence[Pair], present: Mapping[str, Collection[int]], novel: Collection[int]
) -> tuple[Pair, ...]:
    """The pairs whose image shows no novel class at all; `present` says which classes an image shows."""
    forbidden = set(novel)
    unknown = next((image_id for image_id, _ in pairs if image_id not in present), None)
    if unknown is not None:
        raise InputError(f"image {unknown!r} of the split lists is not in the data: give the lists of this data set")
    return tuple((i, c) for i, c in pairs if forbidden.isdisjoint(present[i]))


def _large(pixels: Mapping[int, int], min_object_px: int) -> list[int]:
    """Classes of which an image shows enough."""
    return [c for c, n in pixels.items() if n >= min_object_px]


def _rule(min_object_px: int) -> str:
    if min_object_px < 1:
        raise InputError(f"the smallest object must be at least 1 px, got {min_object_px}")
    return f"rule: at least {min_object_px} px"


def _lists(partition: Partition, fold: int, train: Iterable[Pair], val: Iterable[Pair], origin: str) -> SplitLists:
    base, novel = set(partition.base(fold)), set(partition.tested(fold))
    return SplitLists(
        fold=fold,
        train=tuple(sorted(pair for pair in train if pair[1] in base)),
        val=tuple(sorted(pair for pair in val if pair[1] in novel)),
        origin=origin,
    )


def _list_folder(dataset: str, root: str) -> Folder:
    top = Folder(root)
    for inside in (dataset, ""):
        folder = top.below(inside)
        if folder.has_dir("trn") and folder.has_dir("val"):
            return folder
    raise DatasetNotFoundError(
        f"no split lists under '{root}' (looked for trn/ and val/ there and in {dataset}/): "
        "give the folder with the field's list files, or none to derive the pairs from the masks"
    )


def _pascal_pairs(folder: Folder, name: str, classes: Collection[int], digest: hashlib._Hash) -> list[Pair]:
    data = folder.read(name)
    digest.update(data)
    pairs: list[Pair] = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        image_id, _, label = line.strip().partition("__")
        if not image_id or not label.isdigit() or int(label) - 1 not in classes:
            raise InputError(
                f"'{folder.root}/{name}' line {number} must be IMAGE__CLASS with class "
                f"{min(classes) + 1}..{max(classes) + 1}, got {line.strip()[:80]!r}"
            )
        pairs.append((image_id, int(label) - 1))
    return pairs


def _coco_pairs(folder: Folder, stem: str, classes: Collection[int], digest: hashlib._Hash) -> list[Pair]:
    name = next((n for n in (f"{stem}.pkl", f"{stem}.json") if folder.has_file(n)), f"{stem}.pkl")
    data = folder.read(name)
    digest.update(data)
    where = f"{folder.root}/{name}"
    lists = _plain_pickle(data, where) if name.endswith(".pkl") else _plain_json(data, where)
    if not isinstance(lists, dict):
        raise InputError(f"'{where}' must hold a dict of class -> image names, got {type(lists).__name__}")
    pairs: list[Pair] = []
    for key, images in sorted(((_class_id(k, where), v) for k, v in lists.items()), key=lambda item: item[0]):
        if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
            raise InputError(f"'{where}': class {key} must have a list of image names")
        if images and key not in classes:
            raise InputError(
                f"'{where}' has images of class {key}, which is not one of this list's classes: wrong file?"
            )
        pairs += [(i, key) for i in images]
    return pairs


def _class_id(key: object, where: str) -> int:
    if isinstance(key, int) or (isinstance(key, str) and key.isdigit()):
        return int(key)
    raise InputError(f"'{where}' must have class ids 0..79 as keys, got {key!r:.80}")


class _PlainUnpickler(pickle.Unpickler):
    """Knows dicts, lists, strings and numbers; refuses every name of code, so nothing can be executed."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names the code object {module_name}.{global_name}")


def _plain_pickle(data: bytes, where: str) -> object:
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    # What a damaged pickle raises depends on the byte that is wrong; all of these were seen.
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
            OverflowError, MemoryError) as error:  # fmt: skip
        raise InputError(
            f"'{where}' is not a plain pickle of class -> image names: {error}; nothing of it was executed"
        ) from error


def _plain_json(data: bytes, where: str) -> object:
    try:
        return json.loads(data)
    except ValueError as error:
        raise InputError(f"'{where}' is not valid JSON: {error}") from error
