"""Generated pictures in the layouts of one's own data: the readers read them, and a seed gives the same."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mshnet.data.drawing import look_of
from mshnet.data.own import OwnData
from mshnet.data.shapes_own import write_coco_json, write_fss, write_label_png
from mshnet.data.source import Source, open_source
from mshnet.errors import InputError


def reader(layout: str, folder: Path) -> Source:
    images, masks, names = (str(folder / part) for part in ("images", "masks", "classes.txt"))
    if layout == "coco-json":
        return open_source("coco-json", "", OwnData(images=images, annotations=str(folder / "annotations.json")))
    if layout == "label-png":
        return open_source("voc", "", OwnData(images=images, masks=masks, class_list=names))
    return open_source("fss", str(folder))


@pytest.mark.parametrize(
    ("layout", "write"), [("coco-json", write_coco_json), ("label-png", write_label_png), ("fss", write_fss)]
)
def test_classes_are_dealt_evenly_and_read(layout: str, write: Callable[..., None], tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, images=35, size_px=64, seed=seed, classes=7)
    source, again, other = (reader(layout, tmp_path / name) for name in "abc")
    assert source.fingerprint() == again.fingerprint() != other.fingerprint()
    assert set(source.class_names) == {look_of(i).name for i in range(7)}
    images = Counter(c for record in source.records() for c in source.load(record).masks)
    assert set(images) == set(range(7))
    assert max(images.values()) <= 2 * min(images.values())


def test_both_layouts_show_the_same_pictures(tmp_path: Path) -> None:
    write_coco_json(tmp_path / "json", images=8, size_px=64, classes=3)
    write_label_png(tmp_path / "png", images=8, size_px=64, classes=3)
    for a in (tmp_path / "json/images").iterdir():
        assert a.read_bytes() == (tmp_path / "png/images" / a.name).read_bytes()


def test_bad_numbers_and_other_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"classes must be 2\.\.80, got 81"):
        write_coco_json(tmp_path / "x", classes=81)
    with pytest.raises(InputError, match="images must be as many as classes or more, got 3 and 7"):
        write_fss(tmp_path / "x", images=3)
    assert not (tmp_path / "x").exists()
    write_label_png(tmp_path, images=4, size_px=48, classes=2)
    with pytest.raises(InputError, match=r"holds images generated with .*'label-png'.*asked for .*'coco-json'"):
        write_coco_json(tmp_path, images=4, size_px=48, classes=2)


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mshnet.data.shapes", "--layout", "coco-json", "--out", str(tmp_path / "s")]
    done = subprocess.run(
        [*command, "--images", "5", "--size-px", "48", "--classes", "3"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    source = reader("coco-json", tmp_path / "s")
    assert (len(list(source.records())), len(source.class_names)) == (5, 3)
