"""Data sets that were made to do harm: names that lead elsewhere, pictures and masks that exhaust or end a process."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mshnet.data.coco import CocoSource, _runs
from mshnet.data.pascal import VocSource
from mshnet.data.source import MOST_PIXELS, Folder, Source, open_source
from mshnet.data.splits import read_split_lists
from mshnet.errors import InputError

Copy = Callable[[Path], Path]
Content = dict[str, Any]
ELSEWHERE = ["../../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "a\0b.jpg", "..\\..\\secret.jpg", ".", "..", ""]


@pytest.fixture
def coco(coco_root: Path, copy_of: Copy) -> Callable[[Callable[[Content], object]], CocoSource]:
    """The reader of a copy whose val annotations were edited; a picture lies beside the copy's folder, to be stolen."""
    root = copy_of(coco_root)
    Image.new("RGB", (8, 8)).save(root.parent / "secret.jpg")

    def edited(edit: Callable[[Content], object]) -> CocoSource:
        file = root / "annotations/instances_val2014.json"
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))
        return CocoSource(str(root))

    return edited


def annotated(content: Content, segmentation: object = None) -> Content:
    """The first image; the first annotation is of it, no crowd, and has this mask."""
    first: Content = content["annotations"][0]
    image: Content = next(image for image in content["images"] if image["id"] == first["image_id"])
    if segmentation is not None:
        first.update(id=77, iscrowd=0, segmentation=segmentation)
    return image


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_picture_outside_of_the_data_set_is_none_of_it(coco: Any, name: str) -> None:
    source = coco(lambda content: annotated(content).update(file_name=name))
    with pytest.raises(InputError, match="every annotated image needs its file"):
        list(source.records())


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\0b", ".."])
def test_no_name_leads_out_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("secret")
    (tmp_path / "inside").mkdir()
    folder = Folder(str(tmp_path / "inside"))
    for look in (folder.read, folder.read_image, folder.has_file, folder.sizes):
        with pytest.raises(InputError, match="expected the name of a file below"):
            look(name)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..\\x"])
def test_a_list_names_images_of_the_data_set_only(voc_root: Path, copy_of: Copy, name: str) -> None:
    root = copy_of(voc_root)
    with (root / "ImageSets/Segmentation/val.txt").open("a") as file:
        file.write(f"{name}\n")
    with pytest.raises(InputError, match="1 missing, first"):
        list(VocSource(str(root), "shapes").records())


def test_split_lists_are_names_and_open_nothing(tmp_path: Path) -> None:
    for part in ("trn", "val"):
        (tmp_path / part).mkdir()
        for fold in range(4):
            (tmp_path / part / f"fold{fold}.txt").write_text(f"../../../etc/passwd__{5 * fold + 1:02d}\n")
    assert read_split_lists("pascal", str(tmp_path), 0).val == (
        ("../../../etc/passwd", 0),
    )  # `row` knows no such image


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[2J", "x" * 101])
def test_a_category_has_a_name_that_can_be_shown(coco: Any, name: str) -> None:
    source = coco(lambda content: content["categories"][3].update(name=name))
    with pytest.raises(InputError, match=r"instances_val2014.json.*categories\[3\].name"):
        _ = source.class_names


@pytest.mark.parametrize("far", [1e8, -1e8, 1e300])
def test_a_polygon_that_would_end_the_process(coco: Any, far: float) -> None:
    source = coco(lambda content: annotated(content, [[0, 0, far, 0, far, far]]))
    with pytest.raises(InputError, match=r"annotation 77 has a point at .*, far outside"):
        list(source.records())


@pytest.mark.parametrize(
    "runs",
    [[5], [], [50, 2_000_000_000], [60, -20, 10], "5", "", "o", "PPYo1PPYo1", "é", "0" * 50],
    ids=[
        "short",
        "none",
        "long",
        "negative",
        "text-short",
        "text-none",
        "text-cut",
        "text-long",
        "text-odd",
        "text-zeros",
    ],
)
def test_run_lengths_that_are_not_the_images(coco: Any, runs: object) -> None:
    def edit(content: Content) -> None:
        image = annotated(content)
        annotated(content, {"size": [image["height"], image["width"]], "counts": runs})

    with pytest.raises(InputError, match="annotation 77 has run lengths that do not make up"):
        list(coco(edit).records())


def test_run_lengths_are_decompressed_as_pycocotools_does() -> None:
    from pycocotools import mask as rle_code

    random = np.random.default_rng(0)
    for number in range(50):
        mask = (random.random(random.integers(1, 120, 2)) < random.random()).astype(np.uint8)
        mask = np.repeat(mask, 1 + number % 30, axis=0)
        runs = _runs(rle_code.encode(np.asfortranarray(mask))["counts"].decode())
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), mask.ravel(order="F"))


@pytest.mark.parametrize("size", [0, -1, 100_001, 2**40])
def test_an_image_of_an_impossible_size(coco: Any, size: int) -> None:
    source = coco(lambda content: content["images"][0].update(height=size))
    with pytest.raises(InputError, match=r"instances_val2014.json.*images\[0\].height"):
        list(source.records())


def bomb(width: int, height: int) -> bytes:
    """A PNG of some kilobytes that claims so many black pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">II5B", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(2**20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 20_000, 60_000])  # Pillow warns, refuses, refuses
@pytest.mark.parametrize("dataset", ["shapes", "coco"])
def test_a_picture_with_too_many_pixels_is_refused_undecoded(
    dataset: str, side: int, voc_root: Path, coco_root: Path, copy_of: Copy
) -> None:
    root = copy_of(voc_root if dataset == "shapes" else coco_root)
    source: Source = open_source(dataset, str(root))
    record = next(iter(source.records()))
    (root / record.image_path).write_bytes(bomb(side, side))
    with pytest.raises(InputError, match=rf"cannot decode '{record.image_path}'.*pixels"):
        source.load(record)
    assert side**2 > MOST_PIXELS


def test_no_other_program_is_started_for_a_picture(
    voc_root: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of(voc_root)
    (root / "bin").mkdir()
    ghostscript = root / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {root}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}/bin:{os.environ['PATH']}")
    source = VocSource(str(root), "shapes")
    record = next(iter(source.records()))
    (root / record.image_path).write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 80\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(InputError, match="cannot decode"):
        source.load(record)
    assert not (root / "started").exists()
