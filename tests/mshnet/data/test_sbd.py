"""SegmentationClassAug from VOC's masks and SBD's .mat files, in their real layouts (generated images)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mshnet.data.pascal import VocSource
from mshnet.data.sbd import Built, build_aug_masks
from mshnet.errors import DatasetNotFoundError, InputError

Archives = tuple[Path, Path]


def _write_mat(path: Path, label: np.ndarray) -> None:
    """As SBD's: a struct GTcls with boundaries per class, the label map and the classes present."""
    present = np.unique(label[label > 0])
    content = {"Boundaries": np.zeros((20, 1)), "Segmentation": label, "CategoriesPresent": present}
    savemat(path, {"GTcls": content}, do_compression=True)


@pytest.fixture
def archives(voc_root: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> Archives:
    """VOC as unpacked (masks of ids 0..17, so of validation ids 2, 5, ..., 17) and SBD (ids 12..29)."""
    voc = tmp_path / "up/VOCdevkit/VOC2012"
    voc.parent.mkdir(parents=True)
    copy_of(voc_root).rename(voc)
    sbd = tmp_path / "sbd/benchmark_RELEASE/dataset"
    (sbd / "cls").mkdir(parents=True)
    (voc / "SegmentationClass").mkdir()
    (voc / "ImageSets/Segmentation/trainaug.txt").unlink()
    val = [f"shapes_{i:06d}" for i in range(2, 18, 3)]
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n".join(val) + "\n")
    train = [f"shapes_{i:06d}" for i in range(18) if i % 3 != 2]
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(train) + "\n")
    for index in range(30):
        mask = voc / f"SegmentationClassAug/shapes_{index:06d}.png"
        label = np.array(Image.open(mask))
        if index >= 12:
            _write_mat(sbd / f"cls/{mask.stem}.mat", np.where(label == 255, 0, label).astype(np.uint8))
        if index < 18:
            mask.rename(voc / "SegmentationClass" / mask.name)
        else:
            mask.unlink()
    (voc / "SegmentationClassAug").rmdir()
    return tmp_path / "up", tmp_path / "sbd"


def test_both_sources_are_united_and_vocs_own_mask_wins(archives: Archives, voc_root: Path) -> None:
    assert build_aug_masks(*archives) == Built(masks=30, from_voc=18, from_sbd=12, trainaug=24, val=6)
    source = VocSource(str(archives[0]), "shapes")
    records = list(source.records())
    assert [r.subset for r in records].count("val") == 6
    root = archives[0] / "VOCdevkit/VOC2012"
    for index, record in enumerate(records):
        built = np.array(Image.open(root / record.mask_path))
        original = np.array(Image.open(voc_root / record.mask_path))
        # SBD has no ignored border; where both label an image (12..17) the border shows that VOC's was taken.
        assert np.array_equal(built, original if index < 18 else np.where(original == 255, 0, original))
        source.load(record)
    listed = (root / "ImageSets/Segmentation/trainaug.txt").read_text().split()
    assert listed == [r.image_id for r in records if r.subset == "train"]
    assert not list(root.rglob("*.part"))


def test_a_second_run_changes_nothing_and_a_stopped_one_is_finished(archives: Archives) -> None:
    build_aug_masks(*archives)
    masks = sorted((archives[0] / "VOCdevkit/VOC2012/SegmentationClassAug").iterdir())
    times = [m.stat().st_mtime_ns for m in masks]
    content = masks[20].read_bytes()
    masks[20].unlink()
    build_aug_masks(*archives)
    assert masks[20].read_bytes() == content
    assert [m.stat().st_mtime_ns for i, m in enumerate(masks) if i != 20] == times[:20] + times[21:]


def test_existing_files_of_other_content_are_not_overwritten(archives: Archives) -> None:
    build_aug_masks(*archives)
    mask = archives[0] / "VOCdevkit/VOC2012/SegmentationClassAug/shapes_000003.png"
    Image.new("L", Image.open(mask).size).save(mask)
    before = mask.read_bytes()
    with pytest.raises(InputError, match=r"shapes_000003.png' exists with other labels"):
        build_aug_masks(*archives)
    assert mask.read_bytes() == before
    (archives[0] / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt").write_text("shapes_000000\n")
    with pytest.raises(InputError, match=r"trainaug.txt' exists and lists other images than the 24"):
        build_aug_masks(*archives)


def test_missing_archives(archives: Archives, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"no VOC 2012 under .*looked for JPEGImages, Seg"):
        build_aug_masks(tmp_path / "nowhere", archives[1])
    with pytest.raises(DatasetNotFoundError, match=r"no SBD under .*looked for cls .*benchmark_RELEASE/dataset"):
        build_aug_masks(archives[0], tmp_path / "nowhere")


def test_broken_inputs_are_named(archives: Archives) -> None:
    voc, sbd = archives[0] / "VOCdevkit/VOC2012", archives[1] / "benchmark_RELEASE/dataset"
    mat = sbd / "cls/shapes_000020.mat"
    good = mat.read_bytes()
    mat.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match=r"cannot read GTcls.Segmentation of .*shapes_000020.mat"):
        build_aug_masks(*archives)
    savemat(mat, {"other": 1})
    with pytest.raises(InputError, match=r"shapes_000020.mat': KeyError"):
        build_aug_masks(*archives)
    _write_mat(mat, np.full((64, 64), 21, dtype=np.uint8))
    with pytest.raises(InputError, match=r"shapes_000020.mat' must be a map of labels 0..20, found values \[21\]"):
        build_aug_masks(*archives)
    _write_mat(mat, np.zeros((9, 9), dtype=np.uint8))
    with pytest.raises(InputError, match=r"shapes_000020.jpg' is \d+×\d+ px, its mask 9×9 px"):
        build_aug_masks(*archives)
    mat.write_bytes(good)
    image = voc / "JPEGImages/shapes_000020.jpg"
    image.rename(image.with_suffix(".away"))
    with pytest.raises(InputError, match=r"every mask needs its image .*: 1 missing, first shapes_000020"):
        build_aug_masks(*archives)
    image.with_suffix(".away").rename(image)
    (voc / "SegmentationClass/shapes_000005.png").unlink()
    with pytest.raises(InputError, match=r"every image of val.txt needs its mask .*: 1 missing, first shapes_000005"):
        build_aug_masks(*archives)


def test_the_command(archives: Archives) -> None:
    command = [sys.executable, "-m", "mshnet.data.sbd", "--voc", str(archives[0]), "--sbd", str(archives[1])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"masks": 30, "from_voc": 18, "from_sbd": 12, "trainaug": 24, "val": 6}
    assert "the complete archives give {'masks': 12031" in done.stderr  # a partial copy is noticed
    missing = subprocess.run([*command[:-1], "/nonexistent"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert missing.stderr.startswith("python -m mshnet.data.sbd: no SBD under '/nonexistent'")
