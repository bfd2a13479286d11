"""One's own COCO JSON: an awkward file read right, and each thing that is refused, with its reason."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from mshnet.config import ImageFormat
from mshnet.data.coco import CocoSource
from mshnet.data.drawing import look_of
from mshnet.data.own import OwnData
from mshnet.data.shapes_own import write_coco_json
from mshnet.data.source import Source, open_source
from mshnet.data.store.rows import encode_row
from mshnet.errors import DatasetNotFoundError, InputError
from tests.conftest import needs_shared
from tests.mshnet.data.awkward import CLASSES, LIGHT, Awkward, encoded, write_awkward_coco_json

Content = dict[str, Any]
Edit = Callable[[Content], object]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Awkward:
    """Read only."""
    return write_awkward_coco_json(tmp_path_factory.mktemp("awkward"))


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Source]:
    """The reader of a small sound set whose JSON was edited, or whose files were."""
    write_coco_json(tmp_path, images=8, size_px=48, seed=2, classes=3)

    def edited(edit: Edit = lambda content: None, **own: Any) -> Source:
        file = tmp_path / "annotations.json"
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))
        given = {"images": str(tmp_path / "images"), "annotations": str(file), **own}
        return open_source("coco-json", "", OwnData(**given))

    return edited


def source_of(awkward: Awkward) -> Source:
    return open_source("coco-json", "", awkward.own)


def test_the_images_are_those_that_show_a_chosen_class(awkward: Awkward) -> None:
    source = source_of(awkward)
    source.check()
    records = list(source.records())
    assert [record.image_id for record in records] == sorted(awkward.truth)
    assert {record.subset for record in records} == {"train"}
    assert source.class_names == (*CLASSES, "unused")  # by ascending category id, the two of one name made one


def test_every_mask_is_right_and_lies_where_the_object_is(awkward: Awkward) -> None:
    source = source_of(awkward)
    wrong = []
    for record in source.records():
        labelled = source.load(record)
        wanted = awkward.truth[record.image_id]
        found = {source.class_names[c]: mask for c, mask in labelled.masks.items()}
        assert found.keys() == wanted.keys(), record.image_id
        assert labelled.image.shape == (record.height, record.width, 3)
        wrong += [record.image_id for name in wanted if not np.array_equal(found[name], wanted[name])]
        anything = np.logical_or.reduce(list(wanted.values()))
        assert labelled.image[anything].mean() - labelled.image[~anything].mean() > 80, record.image_id
    assert wrong == []


def test_colours_survive_every_kind_of_picture(awkward: Awkward) -> None:
    source = source_of(awkward)
    for record in source.records():
        if record.image_id == "one bit.png":
            continue
        labelled = source.load(record)
        for class_id, mask in labelled.masks.items():
            only = mask & (sum(m.astype(int) for m in labelled.masks.values()) == 1)
            inner = only[2:-2, 2:-2] & only[:-4, 2:-2] & only[4:, 2:-2] & only[2:-2, :-4] & only[2:-2, 4:]
            light = labelled.image[2:-2, 2:-2][inner]
            assert abs(float(light.mean()) - LIGHT[class_id]) < 6, (record.image_id, class_id)


def test_what_was_decided_is_said(awkward: Awkward) -> None:
    source = source_of(awkward)
    for record in source.records():
        notes = source.load(record).notes
        if record.image_id in awkward.notes:
            assert [awkward.notes[record.image_id] in note for note in notes] == [True]
        else:
            assert notes == ()


def test_what_is_left_aside_is_said(awkward: Awkward) -> None:
    extra = Path(awkward.own.images) / "unnamed.png"
    extra.write_bytes(encoded(np.zeros((4, 4, 3), dtype=np.uint8), "PNG"))
    try:
        assert source_of(awkward).remarks() == (
            "1 image(s) of the JSON have no annotation and take no part",
            "2 annotation(s) of crowds are skipped",
            "1 of 7 categories have no annotation: 'unused'",
            "1 picture(s) of the folder are not in the JSON",
        )
    finally:
        extra.unlink()


def test_it_becomes_rows_of_a_store(awkward: Awkward) -> None:
    source = source_of(awkward)
    form = ImageFormat(image_size_px=33)
    for record in source.records():
        row = encode_row(record.image_id, record.subset, source.load(record), form)
        wanted = awkward.truth[record.image_id]
        assert dict(zip(row["class_ids"], row["pixels"], strict=True)) == {
            source.class_names.index(name): int(mask.sum()) for name, mask in wanted.items()
        }


def test_a_copy_in_a_bucket_is_read_alike(awkward: Awkward) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{awkward.own.images}/", "/own/pictures/", recursive=True)
    memory.put(awkward.own.annotations, "/own/labels.json")
    memory.put(awkward.own.classes, "/own/classes.json")
    there = OwnData(
        images="memory://own/pictures", annotations="memory://own/labels.json", classes="memory://own/classes.json"
    )
    source = pickle.loads(pickle.dumps(open_source("coco-json", "", there)))
    here = source_of(awkward)
    assert list(source.records()) == list(here.records())
    assert source.fingerprint() == here.fingerprint()
    record = next(iter(source.records()))
    assert np.array_equal(source.load(record).image, here.load(record).image)
    memory.rm("/own", recursive=True)


def test_masks_are_those_of_the_field_s_reader(coco_root: Path) -> None:
    """The same file read as COCO 2014's and as one's own."""
    own = OwnData(images=str(coco_root / "val2014"), annotations=str(coco_root / "annotations/instances_val2014.json"))
    mine, theirs = open_source("coco-json", "", own), CocoSource(str(coco_root))
    assert mine.class_names == theirs.class_names
    pairs = list(zip(mine.records(), (r for r in theirs.records() if r.subset == "val"), strict=True))
    assert len(pairs) == 16
    for a, b in pairs:
        assert f"val2014/{a.image_id}" == b.image_id
        one, other = mine.load(a), theirs.load(b)
        assert np.array_equal(one.image, other.image)
        assert one.masks.keys() == other.masks.keys()
        assert all(np.array_equal(one.masks[c], other.masks[c]) for c in one.masks)


@needs_shared
def test_real_images_are_read_as_the_field_s_reader_does(shared: Path) -> None:
    root = shared / "data/COCO2014"
    own = OwnData(images=str(root / "val2014"), annotations=str(root / "annotations/instances_val2014.json"))
    mine, theirs = open_source("coco-json", "", own), CocoSource(str(root))
    pairs = list(zip(mine.records(), (r for r in theirs.records() if r.subset == "val"), strict=True))
    assert (len(pairs), mine.class_names) == (250, theirs.class_names)
    assert mine.remarks() == ("28 annotation(s) of crowds are skipped",)
    for a, b in pairs[::50]:
        one, other = mine.load(a), theirs.load(b)
        assert np.array_equal(one.image, other.image)
        assert one.masks.keys() == other.masks.keys()
        assert all(np.array_equal(one.masks[c], other.masks[c]) for c in one.masks)


def test_the_fingerprint_is_of_what_is_read(broken: Callable[..., Source], tmp_path: Path) -> None:
    before = broken().fingerprint()
    (tmp_path / "images/report.html").write_text("not of the data")
    assert broken().fingerprint() == before
    choice = tmp_path / "classes.json"
    name = look_of(0).name
    choice.write_text(json.dumps({"folds": [[name]]}))
    assert broken(classes=str(choice)).fingerprint() == before  # folds change no record
    choice.write_text(json.dumps({"leave_out": [name]}))
    changed = broken(classes=str(choice)).fingerprint()
    picture = tmp_path / "images/shapes_000000.jpg"
    picture.write_bytes(picture.read_bytes() + b"\0")
    assert len({before, changed, broken().fingerprint()}) == 3


def test_merged_and_left_out_classes(broken: Callable[..., Source], tmp_path: Path) -> None:
    whole = broken()
    first, second, third = whole.class_names
    choice = tmp_path / "classes.json"
    choice.write_text(json.dumps({"merge": {"both": [first, third]}, "leave_out": [second]}))
    source = broken(classes=str(choice))
    assert source.class_names == ("both",)
    wanted = {r.image_id: whole.load(r).masks for r in whole.records()}
    wanted = {i: m.get(0, False) | m.get(2, np.False_) for i, m in wanted.items() if {0, 2} & m.keys()}
    found = {r.image_id: source.load(r).masks for r in source.records()}
    assert found.keys() == wanted.keys()
    assert all(list(m) == [0] and np.array_equal(m[0], wanted[i]) for i, m in found.items())


def _first(content: Content, **change: Any) -> Content:
    annotation: Content = content["annotations"][0]
    annotation.update(id=77, iscrowd=0, **change)
    return annotation


def _image_of(content: Content) -> Content:
    return next(i for i in content["images"] if i["id"] == content["annotations"][0]["image_id"])


def _no_segmentation(content: Content) -> None:
    del _first(content)["segmentation"]


def _no_width(content: Content) -> None:
    del content["images"][0]["width"]


def _twice(content: Content, **change: Any) -> None:
    content["images"].append(content["images"][0] | change)


def _renamed(content: Content, name: str) -> None:
    for category in content["categories"]:
        category["name"] = name


REFUSED: dict[str, tuple[Edit, str]] = {
    "unknown category": (lambda c: _first(c, category_id=9), "annotation 77 has category 9, which is not among"),
    "unknown image": (lambda c: _first(c, image_id="9"), "annotation 77 is of image '9', which is not among"),
    "no segmentation": (_no_segmentation, r"annotation 77 of 'shapes_\d+.jpg' has no mask \(a box alone\?\)"),
    "no polygon": (lambda c: _first(c, segmentation=[]), "has no mask"),
    "null": (lambda c: _first(c, segmentation=None), "has no mask"),
    "flat polygon": (lambda c: _first(c, segmentation=[1, 1, 9, 1, 9, 9]), "neither polygons nor run lengths"),
    "two points": (lambda c: _first(c, segmentation=[[1, 1, 9, 9]]), "annotation 77 has a polygon of 2 points"),
    "odd": (lambda c: _first(c, segmentation=[[1, 1, 9, 1, 9, 9, 4]]), "a polygon of 3.5 points"),
    "far outside": (lambda c: _first(c, segmentation=[[0, 0, 1e9, 0, 5, 5]]), "has a point at 1e\\+09, far outside"),
    "size of runs": (lambda c: _first(c, segmentation={"size": [2, 2], "counts": [4]}), r"an RLE of size \[2, 2\]"),
    "short runs": (
        lambda c: _first(c, segmentation={"size": [_image_of(c)["height"], _image_of(c)["width"]], "counts": [4]}),
        "annotation 77 has run lengths that do not make up",
    ),
    "no width": (_no_width, r"missing required field `width` - at `\$.images\[0\]`"),
    "no height": (lambda c: c["images"][0].update(height=0), r"`int` >= 1 - at `\$.images\[0\].height`"),
    "image twice": (lambda c: _twice(c, file_name="x.jpg"), "expected one image with the id 1, found two or more"),
    "image as text": (lambda c: _twice(c, file_name="x.jpg", id="1"), "expected one image with the id '1', found two"),
    "file twice": (lambda c: _twice(c, id=99, file_name="./shapes_000000.jpg"), "the file_name 'shapes_000000.jpg'"),
    "id of two": (lambda c: c["categories"][0].update(id=c["categories"][1]["id"]), "one category with the id 108"),
    "no category": (lambda c: c.update(categories=[], annotations=[]), "expected categories, found none"),
    "one name": (lambda c: _renamed(c, "thing"), r'several named \'thing\'; .* {"merge": {"thing": \["thing"\]}}'),
    "no name": (lambda c: c["categories"][0].update(name=""), r"at `\$.categories\[0\].name`"),
    "control": (lambda c: c["categories"][0].update(name="a\x1b[2J"), r"at `\$.categories\[0\].name`"),
    "no part": (lambda c: c.pop("images"), "is not in COCO's instance format: .* `images`"),
    "NaN": (lambda c: _first(c, area=float("nan")), "annotations.json' is not valid JSON"),
    "missing": (lambda c: _image_of(c).update(file_name="no.jpg"), "1 missing, first 'no.jpg'; fetch them or leave"),
    "other folder": (
        lambda c: _image_of(c).update(file_name="images/shapes_000000.jpg"),
        "there is 'shapes_000000.jpg': give --images the folder from which file_name counts",
    ),
    "escape": (lambda c: _image_of(c).update(file_name="../../etc/passwd"), "1 missing, first '../../etc/passwd'"),
    "absolute": (lambda c: _image_of(c).update(file_name="/etc/passwd"), "1 missing, first '/etc/passwd'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(broken: Callable[..., Source], case: str) -> None:
    edit, message = REFUSED[case]
    source = broken(edit)
    with pytest.raises(InputError, match=message):
        _ = (source.class_names, list(source.records()))


def test_problems_are_collected_and_the_rest_is_read(broken: Callable[..., Source], tmp_path: Path) -> None:
    whole = len(list(broken().records()))

    def edit(content: Content) -> None:
        alone = next(i for i in content["images"] if sum(a["image_id"] == i["id"] for a in content["annotations"]) == 1)
        annotation = next(a for a in content["annotations"] if a["image_id"] == alone["id"])
        annotation.update(id=5, segmentation=[[1, 1, 9, 9]])
        content["annotations"].append(annotation | {"id": 6, "category_id": 12})
        other = next(i for i in content["images"] if i is not alone)
        (tmp_path / "images" / other["file_name"]).unlink()

    problems: list[str] = []
    records = list(broken(edit).usable_records(problems.append))
    assert len(records) == whole - 2
    assert [text.split("annotation ")[-1][:12] for text in problems[:2]] == ["5 has a poly", "6 has catego"]
    assert "1 missing, first 'shapes_" in problems[2]
    assert len(problems) == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "cannot decode 'shapes_000000.jpg'"),
        (lambda data: b"", "cannot decode 'shapes_000000.jpg'"),
        (lambda data: encoded(np.zeros((9, 9, 3), dtype=np.uint8), "TIFF"), "cannot decode 'shapes_000000.jpg'"),
        (lambda data: encoded(np.zeros((9, 7, 3), dtype=np.uint8), "JPEG"), r"the file is 7×9 px; put the picture"),
    ],
    ids=["cut", "empty", "another format", "resized"],
)
def test_a_picture_that_cannot_be_used(
    broken: Callable[..., Source], tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    source = broken()
    record = next(iter(source.records()))
    picture = tmp_path / "images" / record.image_path
    picture.write_bytes(spoil(picture.read_bytes()))
    with pytest.raises(InputError, match=message):
        source.load(record)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_that_is_broken_counts_as_none(broken: Callable[..., Source], tmp_path: Path) -> None:
    source = broken()
    record = next(iter(source.records()))
    wanted = source.load(record)
    picture = tmp_path / "images" / record.image_path
    jpeg = picture.read_bytes()
    spoilt = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    picture.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(spoilt) + 2) + spoilt + jpeg[2:])
    found = source.load(record)
    assert np.array_equal(found.image, wanted.image)
    assert found.notes == ()


def test_what_is_not_there_is_named(broken: Callable[..., Source], tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(DatasetNotFoundError, match=r"folder of pictures at '.*nowhere', found none \(--images\)"):
        broken(images=nowhere).check()
    with pytest.raises(DatasetNotFoundError, match=r"JSON file at '.*nowhere', found none \(--annotations\)"):
        broken(annotations=nowhere).check()
    with pytest.raises(DatasetNotFoundError, match=r"class file at '.*nowhere', found none"):
        broken(classes=nowhere).check()
    with pytest.raises(InputError, match=r"coco-json needs --images FOLDER and --annotations FILE\.json"):
        open_source("coco-json", "", OwnData(images=nowhere))
    (tmp_path / "annotations.json").write_bytes(b"")
    own = dataclasses.replace(
        OwnData(), images=str(tmp_path / "images"), annotations=str(tmp_path / "annotations.json")
    )
    with pytest.raises(InputError, match=r"annotations\.json' is empty"):
        list(open_source("coco-json", "", own).records())


def test_the_folder_may_be_the_source_s_root(broken: Callable[..., Source], tmp_path: Path) -> None:
    own = OwnData(annotations=str(tmp_path / "annotations.json"))
    rooted = open_source("coco-json", str(tmp_path / "images"), own)
    assert list(rooted.records()) == list(broken().records())
