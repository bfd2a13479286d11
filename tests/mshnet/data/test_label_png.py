"""One's own label PNGs: which pictures they are of, what their values mean, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import ExifTags, Image

from mshnet.data.folds import class_names
from mshnet.data.own import OwnData
from mshnet.data.pascal import VocSource, write_label
from mshnet.data.source import LabelledImage, Source, open_source
from mshnet.errors import DatasetNotFoundError, InputError
from tests.conftest import needs_shared


@pytest.fixture
def own(tmp_path: Path) -> OwnData:
    """Three pictures, two of them labelled, classes a, b and c."""
    for part in ("images/sub dir", "masks/sub dir"):
        (tmp_path / part).mkdir(parents=True)
    label = np.zeros((30, 40), dtype=np.uint8)
    label[2:10, 3:20], label[12:25, 30:38], label[10:12] = 1, 3, 255
    for name in ("1.jpg", "sub dir/日本.PNG", "unlabelled.bmp"):
        form = {"jpg": "JPEG", "PNG": "PNG", "bmp": "BMP"}[name.split(".")[1]]
        Image.new("RGB", (40, 30), (9, 9, 9)).save(tmp_path / "images" / name, format=form)
    write_label(label, tmp_path / "masks/1.png")
    Image.fromarray(np.minimum(label, 2)).save(tmp_path / "masks/sub dir/日本.png")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n\n")
    return OwnData(
        images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), class_list=str(tmp_path / "classes.txt")
    )


def only(own: OwnData, image_id: str = "1.jpg") -> LabelledImage:
    source = open_source("voc", "", own)
    return source.load(next(r for r in source.records() if r.image_id == image_id))


def label_of(own: OwnData) -> np.ndarray:
    return np.array(Image.open(f"{own.masks}/1.png"))


def test_pictures_are_matched_by_name(own: OwnData) -> None:
    source: Source = pickle.loads(pickle.dumps(open_source("voc", "", own)))
    source.check()
    assert [(r.image_id, r.mask_path, r.subset) for r in source.records()] == [
        ("1.jpg", "1.png", "train"),
        ("sub dir/日本.PNG", "sub dir/日本.png", "train"),
    ]
    assert source.class_names == ("a", "b", "c")
    assert source.remarks() == ("without a label PNG, 1 picture(s) take no part",)


def test_values_are_classes(own: OwnData) -> None:
    label, found = label_of(own), only(own)
    assert list(found.masks) == [0, 2]
    assert np.array_equal(found.masks[0], label == 1)
    assert np.array_equal(found.masks[2], label == 3)
    assert found.ignore is not None
    assert np.array_equal(found.ignore, label == 255)
    assert list(only(own, "sub dir/日本.PNG").masks) == [0, 1]


@needs_shared
def test_real_masks_are_read_as_the_field_s_reader_does(shared: Path, tmp_path: Path) -> None:
    root = shared / "data/VOC2012"
    (tmp_path / "classes.txt").write_text("\n".join(class_names("pascal")))
    own = OwnData(
        images=str(root / "JPEGImages"),
        masks=str(root / "SegmentationClassAug"),
        class_list=str(tmp_path / "classes.txt"),
    )
    mine, theirs = open_source("voc", "", own), VocSource(str(root))
    assert mine.class_names == theirs.class_names
    pairs = list(zip(mine.records(), theirs.records(), strict=True))
    for a, b in pairs[::150]:
        assert a.image_id == f"{b.image_id}.jpg"
        one, other = mine.load(a), theirs.load(b)
        assert np.array_equal(one.image, other.image)
        assert one.ignore is not None
        assert np.array_equal(one.ignore, other.ignore)
        assert one.masks.keys() == other.masks.keys()
        assert all(np.array_equal(one.masks[c], other.masks[c]) for c in one.masks)


def test_classes_merged_and_left_out(own: OwnData, tmp_path: Path) -> None:
    choice = tmp_path / "choice.json"
    before = open_source("voc", "", own).fingerprint()
    choice.write_text(json.dumps({"merge": {"ac": ["a", "c"]}, "leave_out": ["b"]}))
    chosen = OwnData(**{**own.__dict__, "classes": str(choice)})
    source = open_source("voc", "", chosen)
    assert source.class_names == ("ac",)
    label = label_of(own)
    (mask,) = only(chosen).masks.values()
    assert np.array_equal(mask, (label == 1) | (label == 3))
    assert list(only(chosen, "sub dir/日本.PNG").masks) == [0]
    assert source.fingerprint() != before


def test_one_folder_for_both(own: OwnData) -> None:
    for mask in ("1.png", "sub dir/日本.png"):
        Path(own.masks, mask).rename(Path(own.images, mask))
    Path(own.images, "sub dir/日本.PNG").unlink()
    Image.new("RGB", (40, 30)).save(Path(own.images, "sub dir/日本.webp"))
    together = OwnData(images=own.images, masks=f"{own.images}/", class_list=own.class_list)
    assert [r.image_id for r in open_source("voc", "", together).records()] == ["1.jpg", "sub dir/日本.webp"]


def test_masks_in_a_folder_below_are_no_pictures(own: OwnData) -> None:
    Path(own.masks).rename(Path(own.images, "labels"))
    below = OwnData(images=own.images, masks=f"{own.images}/labels", class_list=own.class_list)
    source = open_source("voc", "", below)
    assert [r.image_id for r in source.records()] == ["1.jpg", "sub dir/日本.PNG"]
    assert source.remarks() == ("without a label PNG, 1 picture(s) take no part",)


def test_a_bucket_is_read_alike(own: OwnData) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{own.images}/", "/labels/images/", recursive=True)
    memory.put(f"{own.masks}/", "/labels/masks/", recursive=True)
    memory.put(own.class_list, "/labels/classes.txt")
    there = OwnData(
        images="memory://labels/images", masks="memory://labels/masks", class_list="memory://labels/classes.txt"
    )
    source, here = open_source("voc", "", there), open_source("voc", "", own)
    assert list(source.records()) == list(here.records())
    assert source.fingerprint() == here.fingerprint()
    assert np.array_equal(only(there).masks[2], only(own).masks[2])
    memory.rm("/labels", recursive=True)


def test_labels_of_a_picture_that_was_shown_upright(own: OwnData) -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    pixels = np.full((30, 40, 3), 20, dtype=np.uint8)
    pixels[label_of(own) == 1] = 220
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    stored.save(f"{own.images}/1.jpg", exif=tags.tobytes())
    found = only(own)
    assert found.notes == ("turned upright, as its labels are (EXIF)",)
    assert found.image[found.masks[0]].mean() > 180
    assert found.image[~found.masks[0]].mean() < 40


def test_one_bit_is_the_labels_0_and_1(own: OwnData) -> None:
    label = label_of(own)
    Image.fromarray(label == 1).save(f"{own.masks}/1.png")
    assert Image.open(f"{own.masks}/1.png").mode == "1"
    found = only(own)
    assert list(found.masks) == [0]
    assert np.array_equal(found.masks[0], label == 1)


def test_black_and_white_is_pointed_out(own: OwnData) -> None:
    Image.fromarray(255 * (label_of(own) == 1).astype(np.uint8)).save(f"{own.masks}/1.png")
    found = only(own)
    assert found.masks == {}
    assert found.notes == ("no label but 255, which is ignored: of a black and white mask make the white 1",)


def _save(mode: str, value: Any) -> Any:
    return lambda own: Image.new(mode, (40, 30), value).save(f"{own.masks}/1.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_save("RGB", (1, 1, 1)), r"'1.png' must be a palette or grey PNG .* got mode RGB; .* labels 0\.\.3 and 255"),
        (_save("I;16", 1), "got mode I;16"),
        (_save("L", 4), r"labels must be 0\.\.3 or 255, '1.png' has 4"),
        (lambda own: Image.new("L", (30, 30)).save(f"{own.masks}/1.png"), "the labels of '1.jpg' are for 30×30 px"),
        (lambda own: Path(own.masks, "1.png").write_bytes(b"\x89PNG"), r"cannot decode '1\.png'"),
        (lambda own: Path(own.images, "1.jpg").write_bytes(b""), r"cannot decode '1\.jpg'"),
    ],
)
def test_a_mask_that_cannot_be_used(own: OwnData, spoil: Any, message: str) -> None:
    spoil(own)
    with pytest.raises(InputError, match=message):
        only(own)


def test_names_that_do_not_fit(own: OwnData) -> None:
    Image.new("L", (40, 30)).save(f"{own.masks}/2.png")
    Image.new("RGB", (40, 30)).save(f"{own.images}/1.webp")
    problems: list[str] = []
    records = list(open_source("voc", "", own).usable_records(problems.append))
    assert [r.image_id for r in records] == ["1.jpg", "sub dir/日本.PNG"]
    assert "found '1.jpg' and '1.webp'; remove one" in problems[0]
    assert "1 missing, first of '2.png'; add them or remove the masks" in problems[1]
    with pytest.raises(InputError, match="expected one picture of each name"):
        list(open_source("voc", "", own).records())


def test_a_name_that_cannot_be_written_down(own: OwnData) -> None:
    for folder, ending in ((own.images, b".jpg"), (own.masks, b".png")):
        path = folder.encode() + b"/\xff1" + ending
        Path(folder, f"1{ending.decode()}").rename(path.decode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"expected file names in UTF-8 .* found '\\udcff1.jpg'; rename it"):
        list(open_source("voc", "", own).records())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected a class name a line in .*, found none"),
        (b"a\n\nb\n", "in line 2 of .*, found ''"),
        (b"background\na\n", "expected the name of label 1 in line 1 .* found 'background'"),
        (b"__ignore__\n_background_\na\n", "found '__ignore__'"),
        (b"\xff\xfea\0\n\0", "expected UTF-8 text"),
        (b"a\na\n", r"several named 'a'"),
        ("".join(f"class {i}\n" for i in range(255)).encode(), "254 class names at most in .*, found 255"),
    ],
)
def test_a_class_list_that_is_none(own: OwnData, text: bytes, message: str) -> None:
    Path(own.class_list).write_bytes(text)
    with pytest.raises(InputError, match=message):
        open_source("voc", "", own).check()


def test_a_class_list_from_windows(own: OwnData) -> None:
    Path(own.class_list).write_bytes(b"\xef\xbb\xbfroof \r\nb\r\nc\r\n")
    assert open_source("voc", "", own).class_names == ("roof", "b", "c")


def test_what_is_not_there_is_named(own: OwnData, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for part, message in (
        ("images", r"folder of pictures at '.*nowhere', found none \(--images\)"),
        ("masks", r"folder of label PNGs at '.*nowhere', found none \(--masks\)"),
        ("class_list", r"class list at '.*nowhere', found none \(--class-list\)"),
    ):
        with pytest.raises(DatasetNotFoundError, match=message):
            open_source("voc", "", OwnData(**{**own.__dict__, part: nowhere})).check()
    with pytest.raises(InputError, match=r"voc needs --images FOLDER, --masks FOLDER and --class-list FILE, got"):
        open_source("voc", own.images)
    (tmp_path / "none").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"expected label PNGs in '.*none', found none"):
        list(open_source("voc", "", OwnData(**{**own.__dict__, "masks": str(tmp_path / "none")})).records())
