"""The VOC reader on generated files, on the real ones, and on broken ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mshnet.data.folds import class_names
from mshnet.data.pascal import VocSource, write_label
from mshnet.errors import DatasetNotFoundError, InputError
from tests.conftest import needs_shared

Copy = Callable[[Path], Path]


def test_masks_are_the_label_map_class_by_class(voc_root: Path) -> None:
    source = VocSource(str(voc_root), "shapes")
    records = list(source.records())
    assert [r.image_id for r in records] == [f"shapes_{i:06d}" for i in range(30)]
    assert [r.subset for r in records] == ["train", "train", "val"] * 10
    seen = set()
    for record in records:
        labelled = source.load(record)
        label = np.array(Image.open(voc_root / record.mask_path))
        rebuilt = np.zeros_like(label)
        for class_id, mask in labelled.masks.items():
            assert mask.any()
            rebuilt[mask] = class_id + 1
        assert labelled.ignore is not None
        rebuilt[labelled.ignore] = 255
        assert np.array_equal(rebuilt, label)
        assert labelled.image.shape == (*label.shape, 3)
        seen |= labelled.masks.keys()
    assert seen == set(range(20))


@needs_shared
def test_real_images(shared: Path) -> None:
    source = VocSource(str(shared / "data/VOC2012"))
    records = list(source.records())
    assert len(records) == 632
    assert sum(r.subset == "val" for r in records) == 309
    labelled = source.load(records[0])
    assert labelled.image.shape == (281, 500, 3)
    assert {class_names("pascal")[c]: int(m.sum()) for c, m in labelled.masks.items()} == {
        "aeroplane": 4734,
        "person": 866,
    }
    # The same data set from one folder above.
    assert list(VocSource(str(shared / "data")).records()) == records
    assert VocSource(str(shared / "data")).fingerprint() == source.fingerprint()


def test_without_aug_masks_the_command_that_builds_them_is_named(voc_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root)
    (root / "SegmentationClassAug").rename(root / "SegmentationClass")
    with pytest.raises(DatasetNotFoundError, match=r"no SegmentationClassAug.*python -m mshnet.data.sbd --voc"):
        list(VocSource(str(root)).records())


def test_without_val_list(voc_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root)
    (root / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"no ImageSets/Segmentation/val.txt"):
        list(VocSource(str(root)).records())


def test_an_empty_mask_folder(voc_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root)
    for mask in (root / "SegmentationClassAug").iterdir():
        mask.unlink()
    with pytest.raises(DatasetNotFoundError, match=r"no PNG masks in .*SegmentationClassAug"):
        list(VocSource(str(root)).records())


def test_a_listed_image_without_mask(voc_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root)
    (root / "SegmentationClassAug/shapes_000002.png").unlink()
    with pytest.raises(InputError, match=r"val.txt needs a file .*: 1 missing, first 'shapes_000002'"):
        list(VocSource(str(root)).records())


def test_a_mask_without_image(voc_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root)
    (root / "JPEGImages/shapes_000003.jpg").unlink()
    with pytest.raises(InputError, match=r"needs a file JPEGImages/\*.jpg.*: 1 missing, first 'shapes_000003'"):
        list(VocSource(str(root)).records())


def _with_mask(root: Path, mask: Image.Image) -> tuple[VocSource, int]:
    mask.save(root / "SegmentationClassAug/shapes_000004.png")
    source = VocSource(str(root), "shapes")
    return source, next(i for i, r in enumerate(list(source.records())) if r.image_id == "shapes_000004")


def test_a_mask_of_another_size(voc_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root)
    source, row = _with_mask(root, Image.new("L", (40, 30)))
    with pytest.raises(InputError, match=r"'SegmentationClassAug/shapes_000004.png' is 40×30 px, .* is \d+×\d+ px"):
        source.load(list(source.records())[row])


def test_labels_out_of_range(voc_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root)
    label = np.array(Image.open(root / "SegmentationClassAug/shapes_000004.png"))
    label[0, :3] = (21, 254, 20)
    source, row = _with_mask(root, Image.fromarray(label))
    with pytest.raises(InputError, match=r"labels must be 0..20 or 255, .*shapes_000004.png' has 21, 254;"):
        source.load(list(source.records())[row])


def test_a_colour_picture_as_mask(voc_root: Path, copy_of: Copy) -> None:
    root = copy_of(voc_root)
    source, row = _with_mask(root, Image.new("RGB", (64, 64)))
    with pytest.raises(InputError, match=r"must be a palette or grey PNG .* got mode RGB"):
        source.load(list(source.records())[row])


def test_label_pngs_carry_labels_and_vocs_palette(tmp_path: Path) -> None:
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_label(label, tmp_path / "label.png")
    picture = Image.open(tmp_path / "label.png")
    assert picture.mode == "P"
    assert np.array_equal(np.array(picture), label)
    palette = np.array(picture.getpalette()).reshape(256, 3)
    # aeroplane, person and the ignored border, as in every picture of VOC masks
    assert palette[[1, 15, 255]].tolist() == [[128, 0, 0], [192, 128, 128], [224, 224, 192]]
