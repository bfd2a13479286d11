"""The field's list files (counts of the protocol), the rule, and files that are not lists."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from mshnet.data.folds import Partition, base_classes, novel_classes
from mshnet.data.source import open_source
from mshnet.data.splits import Pair, derive_split_lists, is_for_test, own_split_lists, read_split_lists, without_novel
from mshnet.errors import DatasetNotFoundError, InputError
from tests.conftest import needs_shared

MISSING_LINE = ("2011_000688", 14)
"""HSNet's own fold-2 train list has this line and the counts include it; the shared copy has not."""


@needs_shared
@pytest.mark.parametrize(
    ("fold", "val", "val_images", "train", "train_images", "left"),
    [
        (0, 346, 345, 11394, 8450, 10575),
        (1, 451, 433, 10255, 8081, 8528),
        (2, 725, 587, 7797, 7007, 5546),
        (3, 346, 326, 11594, 9002, 10443),
    ],
)
def test_pascal_counts(
    fold: int, val: int, val_images: int, train: int, train_images: int, left: int, shared: Path
) -> None:
    root = str(shared / "reference/splits")
    lists = read_split_lists("pascal", root, fold)
    assert (len(lists.val), len({i for i, _ in lists.val})) == (val, val_images)
    assert {c for _, c in lists.val} == set(novel_classes("pascal", fold))
    assert {c for _, c in lists.train} == set(base_classes("pascal", fold))
    published = lists.train if fold == 2 else (*lists.train, MISSING_LINE)
    assert (len(published), len({i for i, _ in published})) == (train, train_images)
    present: dict[str, set[int]] = {MISSING_LINE[0]: {MISSING_LINE[1]}}
    for other in range(4):
        for image_id, class_id in read_split_lists("pascal", root, other).train:
            present.setdefault(image_id, set()).add(class_id)
    assert len(without_novel(published, present, novel_classes("pascal", fold))) == left


@needs_shared
@pytest.mark.parametrize(
    ("fold", "val", "val_images", "train", "train_images"),
    [
        (0, 35783, 26052, 95476, 62040),
        (1, 17912, 15305, 133927, 74381),
        (2, 14563, 13138, 141054, 73035),
        (3, 14315, 12640, 141016, 73808),
    ],
)
def test_coco_counts(fold: int, val: int, val_images: int, train: int, train_images: int, shared: Path) -> None:
    lists = read_split_lists("coco", str(shared / "reference/splits"), fold)
    assert (len(lists.val), len({i for i, _ in lists.val})) == (val, val_images)
    assert (len(lists.train), len({i for i, _ in lists.train})) == (train, train_images)


@needs_shared
def test_lists_filtered_to_the_real_images(shared: Path) -> None:
    """Directly given folders, and COCO lists as JSON."""
    voc, coco = (str(shared / f"data/{d}/splits_hsnet") for d in ("VOC2012", "COCO2014"))
    assert [len(read_split_lists("pascal", voc, f).val) for f in range(4)] == [64, 100, 201, 99]
    assert [len(read_split_lists("coco", coco, f).val) for f in range(4)] == [239, 152, 117, 103]


def _write_pascal(root: Path) -> None:
    for part in ("trn", "val"):
        (root / part).mkdir(parents=True)
        for fold in range(4):
            lines = [f"{part}_{c}__{c + 1:02d}\n" for c in reversed(novel_classes("pascal", fold))]
            (root / part / f"fold{fold}.txt").write_text("".join(lines))


def test_pascal_lists_in_file_order(tmp_path: Path) -> None:
    _write_pascal(tmp_path / "pascal")
    lists = read_split_lists("pascal", str(tmp_path), 1)
    assert lists.val == tuple((f"val_{c}", c) for c in (9, 8, 7, 6, 5))
    assert [c for _, c in lists.train] == [4, 3, 2, 1, 0, 14, 13, 12, 11, 10, 19, 18, 17, 16, 15]
    assert lists.origin.startswith("lists:")
    assert len(lists.origin) == len("lists:") + 12
    (tmp_path / "pascal/trn/fold3.txt").write_text("other__16\n")
    assert read_split_lists("pascal", str(tmp_path), 1).origin != lists.origin
    # A fold's own training list does not enter its lists.
    before = read_split_lists("pascal", str(tmp_path), 3).origin
    (tmp_path / "pascal/trn/fold3.txt").write_text("another__16\n")
    assert read_split_lists("pascal", str(tmp_path), 3).origin == before


@pytest.mark.parametrize("line", ["2007_000033", "2007_000033__06", "2007_000033__x", "__01", "2007_000033__00"])
def test_a_line_that_is_none_of_the_fold(line: str, tmp_path: Path) -> None:
    _write_pascal(tmp_path)
    (tmp_path / "val/fold0.txt").write_text(f"2007_000032__01\n{line}\n")
    with pytest.raises(InputError, match=r"val/fold0.txt' line 2 must be IMAGE__CLASS with class 1\.\.5, got"):
        read_split_lists("pascal", str(tmp_path), 0)


def test_missing_lists(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="looked for trn/ and val/ there and in coco/"):
        read_split_lists("coco", str(tmp_path), 0)
    (tmp_path / "trn").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"no file 'trn/fold0.pkl'"):
        read_split_lists("coco", str(tmp_path), 0)
    with pytest.raises(InputError, match=r"fold must be 0\.\.3, got 7"):
        read_split_lists("coco", str(tmp_path), 7)


def _write_coco(root: Path, train: object, val: object) -> None:
    for part, content in (("trn", train), ("val", val)):
        (root / part).mkdir(parents=True, exist_ok=True)
        (root / part / "fold0.pkl").write_bytes(pickle.dumps(content))


class _Bomb:
    """Unpickled without care, creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, (str(self.path), "w")


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    _write_coco(tmp_path, {1: ["a"]}, {0: [_Bomb(target)]})
    pickle.loads((tmp_path / "val/fold0.pkl").read_bytes())  # the guard can fail: this pickle does execute
    assert target.exists()
    target.unlink()
    with pytest.raises(InputError, match=r"names the code object _?io.open; nothing of it was executed"):
        read_split_lists("coco", str(tmp_path), 0)
    assert not target.exists()


@pytest.mark.parametrize("cut", [1, 5, 20, 30])
def test_a_damaged_pickle(cut: int, tmp_path: Path) -> None:
    _write_coco(tmp_path, {1: ["a"]}, {0: ["b", "c"], 4: []})
    path = tmp_path / "val/fold0.pkl"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match="is not a plain pickle"):
        read_split_lists("coco", str(tmp_path), 0)


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ([1, 2], "must hold a dict .* got list"),
        ({1: ["a"]}, "has images of class 1, which is not one of this list's classes"),
        ({0: "abc"}, "class 0 must have a list of image names"),
        ({0: [3]}, "class 0 must have a list of image names"),
        ({"cat": ["a"]}, "class ids 0..79 as keys, got 'cat'"),
    ],
)
def test_pickles_that_are_no_lists(val: object, message: str, tmp_path: Path) -> None:
    _write_coco(tmp_path, {1: ["a"]}, val)
    with pytest.raises(InputError, match=message):
        read_split_lists("coco", str(tmp_path), 0)


def test_json_lists_equal_pickled_ones(tmp_path: Path) -> None:
    lists = {"trn": {1: ["b", "a"], 2: ["c"]}, "val": {4: ["y"], 0: ["z", "x"]}}
    _write_coco(tmp_path / "p", lists["trn"], lists["val"])
    for part, content in lists.items():
        (tmp_path / "j" / part).mkdir(parents=True)
        (tmp_path / "j" / part / "fold0.json").write_text(json.dumps(content))
    pickled, plain = (read_split_lists("coco", str(tmp_path / d), 0) for d in "pj")
    assert plain.val == pickled.val == (("z", 0), ("x", 0), ("y", 4))
    assert plain.train == pickled.train == (("b", 1), ("a", 1), ("c", 2))


def test_the_rule_takes_objects_of_2048_px() -> None:
    images = [
        ("b", "train", {0: 9000, 5: 2048, 6: 2047}),
        ("a", "train", {5: 3000, 19: 2048}),
        ("v", "val", {0: 2048, 1: 2047, 5: 9000}),
    ]
    lists = derive_split_lists("pascal", 0, images)
    assert lists.train == (
        ("a", 5),
        ("a", 19),
        ("b", 5),
    )  # b also shows novel class 0: without_novel's matter
    assert lists.val == (("v", 0),)
    assert lists.origin == "rule: at least 2048 px"
    assert without_novel(lists.train, {i: p for i, _, p in images}, {0}) == (("a", 5), ("a", 19))
    assert derive_split_lists("pascal", 0, images, min_object_px=100).val == (("v", 0), ("v", 1))


@needs_shared
@pytest.mark.parametrize(
    ("dataset", "folder", "shown", "listed", "missing", "extra"),
    [("pascal", "VOC2012", 1064, 903, 10, 37), ("coco", "COCO2014", 1367, 923, 9, 44)],
)
def test_the_rule_over_real_masks_gives_nearly_the_fields_lists(
    dataset: str, folder: str, shown: int, listed: int, missing: int, extra: int, shared: Path
) -> None:
    """On the real images at hand, 96% of all pairs are judged alike: docs/benchmarks/split_lists.md says which not."""
    root = shared / "data" / folder
    source = open_source(dataset, str(root))
    images = [
        (record.image_id, record.subset, {c: int(mask.sum()) for c, mask in source.load(record).masks.items()})
        for record in source.records()
    ]
    assert sum(len(pixels) for _, _, pixels in images) == shown
    by_rule: set[Pair] = set()
    by_list: set[Pair] = set()
    for fold in range(4):
        ours = derive_split_lists(dataset, fold, images)
        theirs = read_split_lists(dataset, str(root / "splits_hsnet"), fold)
        for derived, given in ((set(ours.train), set(theirs.train)), (set(ours.val), set(theirs.val))):
            assert len(derived & given) >= 0.98 * len(given)
            assert len(derived & given) >= 0.91 * len(derived)
            by_rule |= derived
            by_list |= given
    assert (len(by_list), len(by_list - by_rule), len(by_rule - by_list)) == (listed, missing, extra)
    assert missing + extra < 0.045 * shown


OWN = Partition(novel=((0, 2), (1,)), names=("a", "b", "c", "d"), origin="2 folds by frequency, seed 0", idle=(3,))


def test_own_data_gives_both_kinds_of_pairs_from_every_image() -> None:
    images = [
        ("z", "train", {0: 3000, 1: 3000}),
        ("y", "train", {1: 3000, 2: 2047}),
        ("x", "train", {1: 2048, 3: 9000}),
    ]
    lists = own_split_lists(OWN, 0, images)
    assert (lists.train, lists.val) == ((("x", 1), ("y", 1), ("z", 1)), (("z", 0),))
    assert lists.origin == "rule: at least 2048 px; 2 folds by frequency, seed 0"
    # y shows a novel class too, though too little of it for a pair.
    assert without_novel(lists.train, {i: p for i, _, p in images}, OWN.tested(0)) == (("x", 1),)
    assert own_split_lists(OWN, 1, images, 100).train == (("y", 2), ("z", 0))


def test_divided_own_data_never_trains_on_an_image_that_tests() -> None:
    images = [(f"{n}.jpg", "train", {0: 3000, 1: 3000}) for n in range(300)]
    lists = own_split_lists(OWN, 0, images, divided=True)
    for_test = {image_id for image_id, _, _ in images if is_for_test(image_id)}
    assert {i for i, _ in lists.val} == for_test
    assert len(for_test) == 105
    assert {i for i, _ in lists.train} == {image_id for image_id, _, _ in images} - for_test
    assert {i for i, _ in own_split_lists(OWN, 1, images, divided=True).val} == for_test  # whatever the fold
    assert "a third of the images" in lists.origin


def test_rule_errors() -> None:
    with pytest.raises(InputError, match="smallest object must be at least 1 px, got 0"):
        derive_split_lists("pascal", 0, [], min_object_px=0)
    with pytest.raises(InputError, match="smallest object must be at least 1 px, got 0"):
        own_split_lists(OWN, 0, [], min_object_px=0)
    with pytest.raises(InputError, match="subset of image 'a' must be train or val, got 'test'"):
        derive_split_lists("pascal", 0, [("a", "test", {})])
    with pytest.raises(InputError, match="image 'a' of the split lists is not in the data"):
        without_novel([("a", 1)], {"b": [1]}, [2])
