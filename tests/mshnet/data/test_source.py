"""What the readers share: opening by name, any URI, broken pictures, fingerprints."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mshnet.data.coco import CocoSource
from mshnet.data.pascal import VocSource
from mshnet.data.source import open_source
from mshnet.errors import DatasetNotFoundError, InputError

Copy = Callable[[Path], Path]


def test_each_dataset_has_its_reader(voc_root: Path, coco_root: Path) -> None:
    assert isinstance(open_source("shapes", str(voc_root)), VocSource)
    assert isinstance(open_source("pascal", str(voc_root)), VocSource)
    assert isinstance(open_source("coco", str(coco_root)), CocoSource)
    with pytest.raises(InputError, match="dataset must be one of pascal, coco, shapes, got 'ade'"):
        open_source("ade", str(voc_root))


@pytest.mark.parametrize("dataset", ["shapes", "coco"])
def test_a_missing_folder_says_what_was_looked_for(dataset: str, tmp_path: Path) -> None:
    wanted = {"shapes": "looked for JPEGImages, SegmentationClassAug", "coco": "instances_train2014.json"}
    with pytest.raises(DatasetNotFoundError, match=wanted[dataset]):
        list(open_source(dataset, str(tmp_path / "nowhere")).records())


@pytest.mark.parametrize("dataset", ["shapes", "coco"])
def test_a_pickled_reader_reads_the_same(dataset: str, voc_root: Path, coco_root: Path) -> None:
    source = open_source(dataset, str(voc_root if dataset == "shapes" else coco_root))
    records = list(source.records())
    data = pickle.dumps(source)
    assert len(data) < 500  # travels to workers: no records, no annotations
    again = pickle.loads(data)
    assert list(again.records()) == records
    assert again.fingerprint() == source.fingerprint()
    first, second = source.load(records[4]), again.load(records[4])
    assert first.masks.keys() == second.masks.keys()
    assert np.array_equal(first.image, second.image)


@pytest.mark.parametrize("dataset", ["shapes", "coco"])
def test_object_storage_reads_the_same(dataset: str, voc_root: Path, coco_root: Path) -> None:
    local = voc_root if dataset == "shapes" else coco_root
    memory = fsspec.filesystem("memory")
    for path in local.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/{dataset}-bucket/{path.relative_to(local)}", path.read_bytes())
    here, there = open_source(dataset, str(local)), open_source(dataset, f"memory://{dataset}-bucket")
    assert list(there.records()) == list(here.records())
    assert there.fingerprint() == here.fingerprint()
    record = next(iter(here.records()))
    mine, theirs = here.load(record), there.load(record)
    assert np.array_equal(mine.image, theirs.image)
    assert all(np.array_equal(mine.masks[c], theirs.masks[c]) for c in mine.masks | theirs.masks)


@pytest.mark.parametrize("dataset", ["shapes", "coco"])
def test_a_truncated_jpeg_is_named(dataset: str, voc_root: Path, coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root if dataset == "shapes" else coco_root)
    source = open_source(dataset, str(root))
    record = list(source.records())[5]
    path = root / record.image_path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"cannot decode '{record.image_path}'.*fetch the file again"):
        source.load(record)


@pytest.mark.parametrize("dataset", ["shapes", "coco"])
def test_a_text_file_instead_of_a_jpeg_is_named(dataset: str, voc_root: Path, coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root if dataset == "shapes" else coco_root)
    source = open_source(dataset, str(root))
    record = next(iter(source.records()))
    (root / record.image_path).write_text("<html>404</html>")
    with pytest.raises(InputError, match=rf"cannot decode '{record.image_path}'.*\(16 bytes\)"):
        source.load(record)


@pytest.mark.parametrize("dataset", ["shapes", "coco"])
def test_the_fingerprint_follows_content_not_place(
    dataset: str, voc_root: Path, coco_root: Path, copy_of: Copy
) -> None:
    original = voc_root if dataset == "shapes" else coco_root
    root = copy_of(original)
    before = open_source(dataset, str(original)).fingerprint()
    assert open_source(dataset, str(root)).fingerprint() == before
    assert len(before) == 64
    listed = root / ("ImageSets/Segmentation/val.txt" if dataset == "shapes" else "annotations/instances_val2014.json")
    listed.write_text(listed.read_text() + "\n")
    changed = open_source(dataset, str(root)).fingerprint()
    assert changed != before
    image = root / next(iter(open_source(dataset, str(root)).records())).image_path
    image.write_bytes(image.read_bytes() + b"\0")
    assert open_source(dataset, str(root)).fingerprint() not in (before, changed)
