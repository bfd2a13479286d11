"""The generated pictures: real layouts, classes dealt evenly, a mixture of sizes, the same for a seed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mshnet.data.drawing import look_of
from mshnet.data.pascal import VocSource
from mshnet.data.shapes import CATEGORY_IDS, class_names, write_coco, write_voc
from mshnet.errors import InputError


def _digest(root: Path) -> dict[str, str]:
    files = (p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_every_class_has_its_own_look() -> None:
    assert len({look_of(c) for c in range(80)}) == 80
    assert len(set(class_names("coco"))) == 80
    assert class_names("voc") == class_names("coco")[:20]
    # Folds of five (VOC) have five textures; no two of the 20 classes share texture and grain.
    assert len({(look_of(c).texture, look_of(c).coarse) for c in range(20)}) == 20
    assert (CATEGORY_IDS[0], CATEGORY_IDS[-1], len(CATEGORY_IDS)) == (1, 90, 80)


def test_a_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_voc(tmp_path / name, images=6, size_px=48, seed=seed)
        write_coco(tmp_path / f"{name}-coco", images=8, size_px=48, seed=seed)
    for suffix in ("", "-coco"):
        first, again, other = (_digest(tmp_path / f"{n}{suffix}") for n in "abc")
        assert first == again
        images = [n for n in first if n.endswith(".jpg")]
        assert all(first[n] != other[n] for n in images)
        assert len(images) == 8 if suffix else 6


def test_the_mixture_of_a_demo(tmp_path: Path) -> None:
    write_voc(tmp_path, images=150, size_px=128, seed=0)
    source = VocSource(str(tmp_path), "shapes")
    images: dict[str, Counter[int]] = {"train": Counter(), "val": Counter()}
    shares, several, ignored = [], 0, []
    for record in list(source.records()):
        labelled = source.load(record)
        images[record.subset].update(labelled.masks.keys())
        shares += [float(m.mean()) for m in labelled.masks.values()]
        several += len(labelled.masks) > 1
        assert labelled.ignore is not None
        ignored.append(float(labelled.ignore.mean()))
        assert max(labelled.image.shape[:2]) == 128
    assert set(images["train"]) == set(images["val"]) == set(range(20))
    assert min(images["val"].values()) >= 2  # 1-shot episodes of every class, even in a small set
    assert max(images["train"].values()) <= 1.6 * min(images["train"].values())
    assert 0.35 < several / 150 < 0.7
    assert 0.09 < float(np.median(shares)) < 0.2
    assert 0.1 < np.mean([s < 0.05 for s in shares]) < 0.35  # some are small
    assert max(shares) < 0.5
    assert 0.005 < float(np.mean(ignored)) < 0.05  # thin borders


def test_some_objects_are_hidden_in_part_and_some_are_crowds(coco_root: Path) -> None:
    kinds: Counter[str] = Counter()
    for subset in ("train", "val"):
        content = json.loads((coco_root / f"annotations/instances_{subset}2014.json").read_text())
        assert len(content["images"]) == (32 if subset == "train" else 16)
        assert [c["id"] for c in content["categories"]] == list(CATEGORY_IDS)
        for annotation in content["annotations"]:
            kind = "polygon" if isinstance(annotation["segmentation"], list) else "rle"
            kinds["crowd" if annotation["iscrowd"] else kind] += 1
    assert kinds["crowd"] == 3
    assert kinds["polygon"] >= 20
    assert kinds["rle"] >= 10


def test_colour_does_not_tell_the_class(tmp_path: Path) -> None:
    """Hues (colour less its brightness, averaged over the object) vary in a class as much as over all."""
    write_voc(tmp_path, images=90, size_px=64, seed=5)
    source = VocSource(str(tmp_path), "shapes")
    hues: dict[int, list[np.ndarray]] = {}
    for record in list(source.records()):
        labelled = source.load(record)
        for class_id, mask in labelled.masks.items():
            colour = labelled.image[mask].mean(0)
            hues.setdefault(class_id, []).append(colour - colour.mean())
    within = np.mean([np.var(h, axis=0, ddof=1).mean() for h in hues.values() if len(h) > 3])
    overall = np.var([x for h in hues.values() for x in h], axis=0, ddof=1).mean()
    assert within > 0.8 * overall
    assert overall > 100  # 10 of 255 or more: they are coloured


def test_written_once_and_never_over_something_else(tmp_path: Path) -> None:
    write_voc(tmp_path / "a", images=3, size_px=48)
    image = tmp_path / "a/JPEGImages/shapes_000000.jpg"
    before = image.stat().st_mtime_ns
    write_voc(tmp_path / "a", images=3, size_px=48)
    assert image.stat().st_mtime_ns == before
    content = image.read_bytes()
    (tmp_path / "a/shapes.json").rename(tmp_path / "a/.shapes.begun.json")  # as a stopped run leaves it
    image.write_bytes(b"half")
    write_voc(tmp_path / "a", images=3, size_px=48)
    assert image.read_bytes() == content
    assert not (tmp_path / "a/.shapes.begun.json").exists()
    with pytest.raises(InputError, match=r"holds images generated with .*'images': 3.*asked for .*'images': 4"):
        write_voc(tmp_path / "a", images=4, size_px=48)
    (tmp_path / "b/annotations").mkdir(parents=True)
    with pytest.raises(InputError, match="holds images that were not generated here"):
        write_coco(tmp_path / "b", images=4, size_px=48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 2}, "images must be 3 or more .* got 2"),
        ({"size_px": 8}, r"size-px must be 32\.\.2048, got 8"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_bad_numbers(change: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_voc(tmp_path / "x", **{"images": 3, "size_px": 48, **change})
    assert not (tmp_path / "x").exists()


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mshnet.data.shapes", "--layout", "voc", "--out", str(tmp_path / "s")]
    done = subprocess.run([*command, "--images", "3", "--size-px", "48"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert len(list(VocSource(str(tmp_path / "s"), "shapes").records())) == 3
    bad = subprocess.run([*command, "--images", "1"], capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stderr.strip() == (
        "python -m mshnet.data.shapes: images must be 3 or more (every third is a validation image), got 1"
    )
    assert subprocess.run([*command, "--imagez", "1"], capture_output=True).returncode == 2
