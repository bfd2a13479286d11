"""FSS-1000's layout: classes by folder, white on black, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mshnet.data.drawing import look_of
from mshnet.data.own import OwnData
from mshnet.data.shapes_own import write_fss
from mshnet.data.source import open_source
from mshnet.errors import DatasetNotFoundError, InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of two images each."""
    write_fss(tmp_path / "fss", images=6, size_px=40, seed=1, classes=3)
    return tmp_path / "fss"


def test_classes_are_the_folders(root: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source("fss", str(root))))
    source.check()
    names = sorted(look_of(i).name for i in range(3))
    assert source.class_names == tuple(names)
    records = list(source.records())
    assert [r.image_id for r in records] == [f"{name}/{n}.jpg" for name in names for n in (1, 2)]
    for record in records:
        labelled = source.load(record)
        (class_id,) = labelled.masks
        assert names[class_id] == record.image_id.split("/")[0]
        white = np.array(Image.open(root / record.mask_path)) == 255
        assert np.array_equal(labelled.masks[class_id], white)
        assert labelled.ignore is None
    assert source.remarks() == ()
    given = open_source("fss", "somewhere else", OwnData(images=str(root)))
    assert list(given.records()) == records


def test_the_archive_s_folder_is_found(root: Path) -> None:
    before = list(open_source("fss", str(root)).records())
    fingerprint = open_source("fss", str(root)).fingerprint()
    top = root.parent / "FSS-1000"
    top.mkdir()
    root.rename(top / "fewshot_data")
    source = open_source("fss", str(top))
    assert list(source.records()) == before
    assert source.fingerprint() == fingerprint


def test_what_lies_elsewhere_is_none_of_the_data(root: Path) -> None:
    fingerprint = open_source("fss", str(root)).fingerprint()
    (root / "readme.txt").write_text("x")
    (root / "empty class").mkdir()
    Image.new("L", (4, 4)).save(root / "preview.png")
    source = open_source("fss", str(root))
    assert len(source.class_names) == 3
    assert source.fingerprint() == fingerprint


def test_grey_from_128_is_the_object_in_whatever_colours(root: Path) -> None:
    source = open_source("fss", str(root))
    record = next(iter(source.records()))
    height, width = source.load(record).image.shape[:2]
    ramp = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
    Image.fromarray(np.repeat(ramp[..., None], 3, axis=2)).save(root / record.mask_path)
    (mask,) = source.load(record).masks.values()
    assert np.array_equal(mask, ramp >= 128)


def test_classes_merged_and_left_out(root: Path, tmp_path: Path) -> None:
    first, second, third = open_source("fss", str(root)).class_names
    choice = tmp_path / "choice.json"
    choice.write_text(json.dumps({"merge": {"both": [first, third]}, "leave_out": [second]}))
    source = open_source("fss", str(root), OwnData(classes=str(choice)))
    assert source.class_names == ("both",)
    records = list(source.records())
    assert {r.image_id.split("/")[0] for r in records} == {first, third}
    assert all(list(source.load(r).masks) == [0] for r in records)
    assert source.fingerprint() != open_source("fss", str(root)).fingerprint()


def test_problems_are_collected(root: Path) -> None:
    name = look_of(0).name
    (root / name / "1.jpg").unlink()
    (root / name / "2.png").unlink()
    problems: list[str] = []
    source = open_source("fss", str(root))
    assert len(list(source.usable_records(problems.append))) == 4
    assert [f"1 missing, first of '{name}/1.png'" in problem for problem in problems] == [True]
    assert source.remarks() == ("without a mask, 1 picture(s) take no part",)
    with pytest.raises(InputError, match="1 missing, first of"):
        list(source.records())


def _mask(value: int, size: tuple[int, int] | None = None) -> Any:
    def spoil(path: Path) -> None:
        Image.new("L", size or Image.open(path).size, value).save(path)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_mask(1), r"'.*1\.png' must be white \(255\) where the object is, its brightest pixel has 1; replace"),
        (_mask(255, (5, 6)), r"the labels of '.*1\.jpg' are for 5×6 px, the file is"),
        (lambda path: path.write_bytes(b""), r"cannot decode '.*1\.png'"),
    ],
)
def test_a_mask_that_cannot_be_used(root: Path, spoil: Any, message: str) -> None:
    source = open_source("fss", str(root))
    record = next(iter(source.records()))
    spoil(root / record.mask_path)
    with pytest.raises(InputError, match=message):
        source.load(record)


def test_a_black_mask_is_pointed_out(root: Path) -> None:
    source = open_source("fss", str(root))
    record = next(iter(source.records()))
    _mask(0)(root / record.mask_path)
    found = source.load(record)
    assert (found.masks, found.notes) == ({}, ("its mask shows no object",))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"a folder per class at '.*nowhere', found none"):
        open_source("fss", str(tmp_path / "nowhere")).check()
    with pytest.raises(InputError, match="fss needs --images FOLDER"):
        open_source("fss", "")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"")
    with pytest.raises(
        DatasetNotFoundError, match=r"expected CLASS/N.jpg with CLASS/N.png under .*, found no such PNG"
    ):
        list(open_source("fss", str(tmp_path)).records())
