"""The COCO reader against pycocotools' own masks, on the real files, and on broken annotations."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from mshnet.data.coco import CocoSource
from mshnet.data.shapes import CATEGORY_IDS, class_names
from mshnet.errors import DatasetNotFoundError, InputError
from tests.conftest import needs_shared

Copy = Callable[[Path], Path]
Edit = Callable[[dict[str, Any]], None]


def _reference_masks(annotation_file: Path, image_id: int) -> dict[int, np.ndarray]:
    """Category id -> union of annToMask over the annotations that are no crowds."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotation_file))
    masks: dict[int, np.ndarray] = {}
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[image_id], iscrowd=False)):
        mask = coco.annToMask(annotation).astype(bool)
        masks[annotation["category_id"]] = masks.get(annotation["category_id"], np.zeros_like(mask)) | mask
    return {c: m for c, m in masks.items() if m.any()}


def _number(image_path: str) -> int:
    return int(image_path.rsplit("_", 1)[-1].removesuffix(".jpg"))


def test_masks_are_unions_of_ann_to_mask(coco_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = CocoSource(str(coco_root))
    assert source.class_names == class_names("coco")
    for record in list(source.records())[::5]:
        labelled = source.load(record)
        wanted = _reference_masks(
            coco_root / f"annotations/instances_{record.subset}2014.json", _number(record.image_path)
        )
        assert {CATEGORY_IDS[c] for c in labelled.masks} == wanted.keys()
        for class_id, mask in labelled.masks.items():
            assert np.array_equal(mask, wanted[CATEGORY_IDS[class_id]])
        assert labelled.ignore is None
    assert capsys.readouterr().out == ""


@needs_shared
def test_real_images(shared: Path) -> None:
    root = shared / "data/COCO2014"
    source = CocoSource(str(root))
    records = list(source.records())
    assert [r.image_id for r in records] == sorted(r.image_id for r in records)
    counts = {s: sum(r.subset == s for r in records) for s in ("train", "val")}
    assert counts == {"train": 118, "val": 250}
    annotation_file = root / "annotations/instances_val2014.json"
    content = json.loads(annotation_file.read_text())
    with_crowd = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    categories = sorted(c["id"] for c in content["categories"])
    checked = [r for r in records if r.subset == "val" and _number(r.image_path) in with_crowd][:3]
    for record in checked:
        wanted = _reference_masks(annotation_file, _number(record.image_path))
        masks = source.load(record).masks
        assert {categories[c] for c in masks} == wanted.keys()
        assert all(np.array_equal(m, wanted[categories[c]]) for c, m in masks.items())


def test_crowds_are_skipped(coco_root: Path) -> None:
    content = json.loads((coco_root / "annotations/instances_train2014.json").read_text())
    crowd = next(a for a in content["annotations"] if a["iscrowd"])
    instances = [a for a in content["annotations"] if a["image_id"] == crowd["image_id"] and not a["iscrowd"]]
    source = CocoSource(str(coco_root))
    record = next(r for r in list(source.records()) if _number(r.image_path) == crowd["image_id"])
    found = {CATEGORY_IDS[c] for c in source.load(record).masks}
    assert found == {a["category_id"] for a in instances}
    assert crowd["category_id"] not in found


def _broken(root: Path, edit: Edit, subset: str = "val") -> CocoSource:
    path = root / f"annotations/instances_{subset}2014.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return CocoSource(str(root))


def test_ids_and_categories_may_come_in_any_order(coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(coco_root)
    before = CocoSource(str(coco_root))

    def shuffle(content: dict[str, Any]) -> None:
        for part in content.values():
            part.reverse()

    after = _broken(root, shuffle)
    assert after.class_names == before.class_names
    assert list(after.records()) == list(before.records())
    record = list(before.records())[-1]
    assert after.load(record).masks.keys() == before.load(record).masks.keys()


def test_an_image_with_nothing_but_crowds_is_no_record(coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(coco_root)

    def crowd(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            if annotation["image_id"] == 5:
                annotation["iscrowd"] = 1

    source = _broken(root, crowd)
    assert len(list(source.records())) == len(list(CocoSource(str(coco_root)).records())) - 1


def test_a_changed_file_is_read_again(coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(coco_root)
    before = len(list(CocoSource(str(root)).records()))
    after = _broken(root, lambda c: c["annotations"].clear())
    assert len(list(after.records())) == before - 16  # the cached annotations of the old file are not used


def _first(content: dict[str, Any], kind: type) -> dict[str, Any]:
    found: dict[str, Any] = next(
        a for a in content["annotations"] if isinstance(a["segmentation"], kind) and not a["iscrowd"]
    )
    return found


def _unknown_category(content: dict[str, Any]) -> None:
    content["annotations"][0].update(id=13, category_id=4712)


def _two_points(content: dict[str, Any]) -> None:
    annotation = _first(content, list)
    annotation.update(id=4711, segmentation=[[1.0, 2.0, 3.0, 4.0]])


def _odd_polygon(content: dict[str, Any]) -> None:
    _first(content, list)["segmentation"] = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]


def _no_polygon(content: dict[str, Any]) -> None:
    _first(content, list)["segmentation"] = []


def _other_size(content: dict[str, Any]) -> None:
    _first(content, dict)["segmentation"]["size"] = [9, 9]


def _unknown_image(content: dict[str, Any]) -> None:
    content["annotations"][0].update(id=12, image_id=999)


def _79_categories(content: dict[str, Any]) -> None:
    content["categories"] = content["categories"][:79]
    content["annotations"] = []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_unknown_category, "annotation 13 has category 4712, which is not among the file's categories"),
        (_two_points, "annotation 4711 has a polygon of 2 points, .* at least 3 points"),
        (_odd_polygon, "a polygon of 3.5 points, expected pairs of x and y"),
        (_no_polygon, "a polygon of 0 points"),
        (
            _other_size,
            r"annotation \d+ has an RLE of size \[9, 9\], its image is \[\d+, \d+\]",
        ),
        (_unknown_image, "annotation 12 is of image 999, which is not among the file's images"),
        (
            lambda c: c["images"].append(c["images"][1]),
            "expected one image with the id 5, found two or more; keep the one",
        ),
        (
            lambda c: c["images"].append(c["images"][1] | {"id": 4713}),
            "expected one image with the file_name 'COCO_val2014_000000000005.jpg', found two or more; keep the one",
        ),
        (lambda c: c.pop("annotations"), "is not in COCO's instance format: .*missing required field `annotations`"),
        (lambda c: c["images"][0].pop("height"), r"missing required field `height` - at `\$.images\[0\]`"),
        (lambda c: c["annotations"][0].pop("category_id"), "missing required field `category_id`"),
        (lambda c: c["annotations"][0].update(id=14, segmentation="disc"), "annotation 14 is neither polygons nor run"),
        (lambda c: c["annotations"][0].update(id=15, segmentation=[["a"] * 6]), "annotation 15 is neither polygons"),
    ],
)
def test_broken_annotations_name_file_and_annotation(edit: Edit, message: str, coco_root: Path, copy_of: Copy) -> None:
    source = _broken(copy_of(coco_root), edit)
    with pytest.raises(InputError, match=f"instances_val2014.json.*{message}"):
        list(source.records())


def test_another_number_of_categories(coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(coco_root)
    _broken(root, _79_categories, "train")
    with pytest.raises(InputError, match=r"categories of the train and val annotations .* differ"):
        list(CocoSource(str(root)).records())
    with pytest.raises(InputError, match="must have 80 categories, found 79"):
        list(_broken(root, _79_categories, "val").records())


def test_json_that_is_none(coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(coco_root)
    path = root / "annotations/instances_train2014.json"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"instances_train2014.json' is not valid JSON"):
        list(CocoSource(str(root)).records())
    path.write_text("[]")
    with pytest.raises(InputError, match="is not in COCO's instance format: Expected `object`, got `array`"):
        list(CocoSource(str(root)).records())
    path.write_text("")
    with pytest.raises(InputError, match=r"instances_train2014.json' is empty; fetch the file again"):
        list(CocoSource(str(root)).records())


KILLED = """
import os, signal, sys
from pathlib import Path
import fsspec
from mshnet.data.coco import CocoSource

root = Path(sys.argv[1])
memory = fsspec.filesystem("memory")
for path in root.rglob("*"):
    if path.is_file():
        memory.pipe_file(f"/bucket/{path.relative_to(root)}", path.read_bytes())
print(sum(1 for record in CocoSource("memory://bucket").records()))
source = CocoSource("memory://bucket")
next(source.records())
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_scan_that_is_killed_leaves_no_copy(coco_root: Path, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", KILLED, str(coco_root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == f"{len(list(CocoSource(str(coco_root)).records()))}\n"
    assert list(tmp_path.iterdir()) == []


def test_copies_go_with_their_source(coco_root: Path) -> None:
    def held() -> set[str]:
        """This process's open files that have no name any more."""
        gc.collect()
        files = set()
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                target = os.readlink(f"/proc/self/fd/{number}")
                files |= {f"{number} {target}"} if target.endswith("(deleted)") else set()
        return files

    memory = fsspec.filesystem("memory")
    memory.put(str(coco_root), "/copies", recursive=True)
    before = held()
    source = CocoSource("memory://copies")
    assert len(source.fingerprint()) == 64
    copies = held() - before
    assert len(copies) == 2
    del source
    assert not held() & copies
    memory.rm("/copies", recursive=True)


def test_a_full_temporary_folder_is_named(coco_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(coco_root), "/full", recursive=True)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: io.FileIO("/dev/full", "w+"))
    message = "a copy of 'memory://full/annotations/instances_train2014.json' in the temporary folder '.*TMPDIR"
    with pytest.raises(InputError, match=message):
        CocoSource("memory://full").fingerprint()
    memory.rm("/full", recursive=True)


def test_a_missing_folder_is_named(coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(coco_root)
    (root / "val2014").rename(root / "val2017")
    with pytest.raises(DatasetNotFoundError, match="missing val2014"):
        list(CocoSource(str(root)).records())


def test_missing_images_are_counted_at_once(coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(coco_root)
    for number in (2, 5):
        (root / f"val2014/COCO_val2014_{number:012d}.jpg").unlink()
    with pytest.raises(InputError, match=r"2 missing, first 'val2014/COCO_val2014_000000000002.jpg'"):
        list(CocoSource(str(root)).records())


def test_an_image_of_another_size_than_its_annotations(coco_root: Path, copy_of: Copy) -> None:
    root = copy_of(coco_root)
    source = CocoSource(str(root))
    record = list(source.records())[3]
    Image.new("RGB", (50, 40)).save(root / record.image_path)
    with pytest.raises(InputError, match=r"one size: .* are for \d+×\d+ px, the file is 50×40 px"):
        source.load(record)
