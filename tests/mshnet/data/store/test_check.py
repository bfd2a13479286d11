"""A shard is checked end to end: what was written passes, and each way to be wrong is named."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mshnet.config import ImageFormat
from mshnet.data.store.check import MOST_PROBLEMS, check_shard
from mshnet.data.store.manifest import Manifest, Shard
from mshnet.data.store.rows import crc32, encode_row, labels_crc32
from mshnet.data.store.shards import write_shard
from mshnet.errors import InputError
from tests.mshnet.data.stored import PNG_65, noise_image

JPEG_65 = ImageFormat(image_size_px=65)


def manifest_of(shard: Shard, format: ImageFormat = PNG_65) -> Manifest:
    """Of a store with one shard."""
    return Manifest(
        dataset="shapes",
        source_fingerprint="f" * 64,
        class_names=("disc", "bar", "ring"),
        mask_mode="drawn by hand",
        format=format,
        shards=(shard,),
        images_per_class={},
    )


def written(folder: Path, change: Callable[[dict[str, Any]], object] = lambda row: None, rows: int = 3) -> Shard:
    """A shard of three rows with the second changed before it was written."""
    encoded = [encode_row(f"image {i}", "train", noise_image(i), PNG_65) for i in range(rows)]
    for row in encoded[1:]:
        change(row)
        row["labels_crc32"] = labels_crc32(row)
        row["crc32"] = crc32(row["class_ids"], [row["image"], *row["masks"], row["ignore"] or b""])
    return write_shard(encoded, str(folder))


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_sound_shard_has_no_problems(scheme: str, tmp_path: Path) -> None:
    uri = str(tmp_path) if scheme == "local" else "memory://check-test"
    images = [noise_image(i) for i in range(70)]  # more than one batch
    images[1] = replace(images[1], masks={}, ignore=None)
    shard = write_shard((encode_row(f"{i}", "train", image, JPEG_65) for i, image in enumerate(images)), uri)
    check = check_shard(uri, manifest_of(shard, JPEG_65), shard)
    assert check.problems == ()
    assert check.images_per_class == {0: 69, 2: 69}


def test_a_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "memory://check-full"
    shard = write_shard([encode_row("a", "train", noise_image(0), PNG_65)], uri)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: io.FileIO("/dev/full", "w+"))
    message = (
        f"expected room for the {shard.size_bytes} bytes of a shard in the temporary folder '.*', found none .*TMPDIR"
    )
    with pytest.raises(InputError, match=message):
        check_shard(uri, manifest_of(shard), shard)


def test_missing_of_another_size_and_changed(tmp_path: Path) -> None:
    shard = written(tmp_path)
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    check = check_shard(str(tmp_path), manifest_of(shard), shard)
    assert len(check.problems) == 1
    assert check.problems[0].startswith(f"expected sha256 {shard.sha256[:12]}…, found ")
    path.write_bytes(data[:-7])
    check = check_shard(str(tmp_path), manifest_of(shard), shard)
    assert check.problems == (f"expected {len(data)} bytes, found {len(data) - 7}",)
    path.unlink()
    assert check_shard(str(tmp_path), manifest_of(shard), shard).problems == (
        f"expected {len(data)} bytes, found none",
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda row: row.update(image=row["image"][: len(row["image"]) // 2]),
            "expected pictures that decode in row 1",
        ),
        (lambda row: row.update(masks=[b"no picture", row["masks"][1]]), "expected pictures that decode in row 1"),
        (lambda row: row.update(pixels=[1, 2]), "expected masks of [1, 2] pixels in row 1 (image 1), found ["),
        (lambda row: row.update(height=7), "expected masks of (7, 70) in row 1 (image 1), found [(50, 70)"),
        (
            lambda row: row.update(image=encode_row("", "", noise_image(0), ImageFormat(image_size_px=64))["image"]),
            "expected an image of shape (3, 65, 65) in row 1 (image 1), found (3, 64, 64)",
        ),
    ],
)
def test_mistakes_of_a_writer(change: Callable[[dict[str, Any]], object], problem: str, tmp_path: Path) -> None:
    shard = written(tmp_path, change, rows=2)
    found = check_shard(str(tmp_path), manifest_of(shard), shard).problems
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_a_wrong_crc_and_a_wrong_count_of_rows(tmp_path: Path) -> None:
    row = encode_row("a", "train", noise_image(0), PNG_65)
    shard = write_shard([row | {"crc32": 0xDEADBEEF}], str(tmp_path))
    assert check_shard(str(tmp_path), manifest_of(shard), shard).problems == (
        f"expected crc32 deadbeef in row 0, found {row['crc32']:08x}",
    )
    other = replace(shard, rows=3)
    assert check_shard(str(tmp_path), manifest_of(other), other).problems == ("expected 3 rows, found 1",)


def test_a_file_that_is_no_arrow_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(1000)
    shard = Shard(name="images-x.arrow", sha256=hashlib.sha256(data).hexdigest(), rows=1, size_bytes=len(data))
    (tmp_path / shard.name).write_bytes(data)
    (problem,) = check_shard(str(tmp_path), manifest_of(shard), shard).problems
    assert problem.startswith("expected an Arrow file with class_ids")


def test_not_every_problem_is_named(tmp_path: Path) -> None:
    shard = written(tmp_path, lambda row: row.update(pixels=[1, 2]), rows=MOST_PROBLEMS + 6)
    problems = check_shard(str(tmp_path), manifest_of(shard), shard).problems
    assert len(problems) == MOST_PROBLEMS + 1
    assert problems[-1] == "and 5 more"
