"""Shard files: named by their content, written in bounded memory, read by any Arrow reader."""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mshnet.data.store.rows import SCHEMA, encode_row
from mshnet.data.store.shards import BATCH_ROWS, LABELS, DamagedShardError, ShardIndex, read_labels, write_shard
from mshnet.errors import InputError
from tests.mshnet.data.stored import PNG_65, noise_image


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Small ones; every fifth without a class or an ignore mask."""
    for i in range(count):
        image = noise_image(i, 20, 24)
        yield encode_row(f"{i:03}", "val", image if i % 5 else replace(image, masks={}, ignore=None), PNG_65)


def opened(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def test_a_shard_is_named_by_its_content(tmp_path: Path) -> None:
    written = list(rows(2))
    first, again = write_shard(written, str(tmp_path / "1")), write_shard(iter(written), str(tmp_path / "2"))
    assert first == again
    data = (tmp_path / "1" / first.name).read_bytes()
    assert (tmp_path / "2" / first.name).read_bytes() == data
    digest = hashlib.sha256(data).hexdigest()
    assert (first.sha256, first.name) == (digest, f"images-{digest[:16]}.arrow")
    assert (first.size_bytes, first.rows) == (len(data), 2)
    written[1]["subset"] = "train"
    changed = write_shard(written, str(tmp_path / "1"))
    assert changed.name != first.name
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == sorted([first.name, changed.name])  # nothing half-written is left beside them


@pytest.mark.parametrize("count", [0, 1, BATCH_ROWS, 2 * BATCH_ROWS + 9])
def test_rows_come_back_from_batches(count: int, tmp_path: Path) -> None:
    shard = write_shard(rows(count), str(tmp_path))
    reader = pa.ipc.open_file(pa.memory_map(str(tmp_path / shard.name)))
    assert reader.num_record_batches == -(-count // BATCH_ROWS)
    assert shard.rows == count
    data = opened(tmp_path / shard.name)
    index, labels = ShardIndex(data, count), read_labels(data, count)
    with open(tmp_path / shard.name, "rb") as file:
        assert read_labels(file, count) == labels
    assert len(labels) == count
    for i, row in enumerate(rows(count)):
        assert labels[i] == {name: row[name] for name in LABELS}
        encoded = index.read(data, i)
        assert encoded.image == row["image"]
        assert encoded.masks == dict(zip(row["class_ids"], row["masks"], strict=True))
        assert encoded.ignore == (row["ignore"] or b"")


def test_any_arrow_reader_reads_it(tmp_path: Path) -> None:
    """Other programs need no code of ours: column names, encoded pictures, one-bit masks."""
    image = noise_image(1, 51, 73)
    shard = write_shard([encode_row(name, "train", image, PNG_65) for name in "ab"], str(tmp_path))
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / shard.name))).read_all()
    assert table.schema == SCHEMA
    assert table.num_rows == 2
    row = table.to_pylist()[1]
    assert (row["image_id"], row["height"], row["width"]) == ("b", 51, 73)
    assert row["class_ids"] == [0, 2]  # ascending, whatever order the reader gave
    assert Image.open(io.BytesIO(row["image"])).size == (65, 65)
    for class_id, png, pixels in zip(row["class_ids"], row["masks"], row["pixels"], strict=True):
        mask = np.asarray(Image.open(io.BytesIO(png)))
        np.testing.assert_array_equal(mask, image.masks[class_id])  # lossless, original size
        assert pixels == image.masks[class_id].sum()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["ignore"]))), image.ignore)


def test_later_columns_are_left_alone_and_missing_ones_named(tmp_path: Path) -> None:
    """A later minor version may add columns, anywhere."""
    shard = write_shard(rows(70), str(tmp_path))
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / shard.name))).read_all()
    more = table.add_column(0, "depth", pa.array([[1.5, 2.5]] * 70)).append_column("license", pa.array(["CC0"] * 70))
    for name, columns in (("more", more), ("less", table.drop_columns(["pixels", "crc32"]))):
        with pa.ipc.new_file(str(tmp_path / name), columns.schema) as writer:
            writer.write_table(columns)
    data, old = opened(tmp_path / "more"), opened(tmp_path / shard.name)
    assert read_labels(data, 70) == read_labels(old, 70)
    with open(tmp_path / "more", "rb") as file:
        assert read_labels(file, 70) == read_labels(old, 70)
    for i in range(70):
        assert ShardIndex(data, 70).read(data, i) == ShardIndex(old, 70).read(old, i)
    data = opened(tmp_path / "less")
    for read in (read_labels, ShardIndex):
        with pytest.raises(DamagedShardError, match=r"expected an Arrow file with .*, found another"):
            read(data, 70)


@pytest.mark.parametrize("column", ["image", "masks", "ignore", "class_ids", "crc32"])
def test_each_part_of_the_pixels_is_checked(column: str, tmp_path: Path) -> None:
    row = encode_row("a", "train", noise_image(0), PNG_65)
    other = encode_row("a", "train", noise_image(1), PNG_65)
    changed = row | {column: [0, 1] if column == "class_ids" else other[column]}
    shard = write_shard([changed], str(tmp_path))
    data = opened(tmp_path / shard.name)
    with pytest.raises(DamagedShardError, match=r"expected crc32 [0-9a-f]{8} in row 0, found [0-9a-f]{8}"):
        ShardIndex(data, 1).read(data, 0)


@pytest.mark.parametrize(
    "change",
    [{"image_id": "b"}, {"subset": "val"}, {"height": 51}, {"width": 51}, {"class_ids": [0, 1]}, {"pixels": [1, 2]}],
)
def test_each_label_is_checked(change: dict[str, Any], tmp_path: Path) -> None:
    shard = write_shard([encode_row("a", "train", noise_image(0), PNG_65) | change], str(tmp_path))
    with pytest.raises(DamagedShardError, match=r"expected crc32 [0-9a-f]{8} in row 0, found [0-9a-f]{8}"):
        read_labels(opened(tmp_path / shard.name), 1)


def test_an_error_of_the_file_is_not_taken_for_damage(tmp_path: Path) -> None:
    class Unreachable(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, *_: Any) -> int:
            raise ConnectionError("the object store does not answer")

        tell = seek

    with pytest.raises(ConnectionError, match="does not answer"):
        read_labels(Unreachable(), 1)


def test_nothing_is_left_when_a_row_cannot_be_made(tmp_path: Path) -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield from rows(70)
        raise OSError(errno.EIO, "the source broke off")

    with pytest.raises(OSError, match="the source broke off"):
        write_shard(failing(), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a full disk of the store."""
    monkeypatch.setattr("tempfile.TemporaryFile", lambda buffering: io.FileIO("/dev/full", "w+"))
    folder = re.escape(tempfile.gettempdir())
    message = f"expected room for a shard in the temporary folder '{folder}', found none .*No space.*; set TMPDIR to a"
    with pytest.raises(InputError, match=message):
        write_shard(rows(70), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_shard_is_whole_where_the_system_writes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does before a disk is full, and for more than 2 GiB at once."""

    class Parts(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:1000])

    expected = write_shard(rows(3), str(tmp_path / "1"))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda buffering: Parts(tmp_path / "spool", "w+"))
    assert write_shard(rows(3), str(tmp_path / "2")) == expected
    assert (tmp_path / "2" / expected.name).read_bytes() == (tmp_path / "1" / expected.name).read_bytes()


MEMORY = """
import resource, sys
from mshnet.data.store.shards import write_shard

def rows(count):
    for i in range(count):
        pixels = bytes([i % 251]) * 100_000
        yield {"image_id": str(i), "subset": "val", "height": 1, "width": 1, "class_ids": [1], "pixels": [1],
               "labels_crc32": 1, "crc32": 1, "image": pixels, "masks": [b"m"], "ignore": None}

shard = write_shard(rows(int(sys.argv[1])), sys.argv[2])
print(shard.size_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "torch" in sys.modules)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A process that writes 96 MB needs no more than one that writes 24 MB; neither loads torch."""

    def measure(count: int) -> tuple[int, int, str]:
        command = [sys.executable, "-c", MEMORY, str(count), str(tmp_path)]
        size, peak, torch = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(size), int(peak), torch

    small, large = measure(240), measure(960)
    assert large[0] - small[0] > 70_000_000
    assert large[1] - small[1] < 10_000_000
    assert small[2] == large[2] == "False"


def test_one_flipped_bit_anywhere_is_never_given_out(tmp_path: Path) -> None:
    """Of the pixels, of the labels or of Arrow's own structure: refused, or without any effect."""
    expected = list(rows(4))
    shard = write_shard(expected, str(tmp_path))
    good = (tmp_path / shard.name).read_bytes()
    rng, refused = random.Random(0), 0
    # Every other flip in the structure: the schema and first message, or the footer.
    around = [*range(4000), *range(len(good) - 4000, len(good))]
    for i in range(400):
        data = bytearray(good)
        data[rng.choice(around) if i % 2 else rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped").write_bytes(data)
        mapped = opened(tmp_path / "flipped")
        try:
            assert read_labels(mapped, 4) == [{name: row[name] for name in LABELS} for row in expected]
        except DamagedShardError:
            refused += 1
        for number, row in enumerate(expected):
            try:
                found = ShardIndex(mapped, 4).read(mapped, number)
            except DamagedShardError:
                refused += 1
            else:
                assert found.image == row["image"]
                assert found.masks == dict(zip(row["class_ids"], row["masks"], strict=True))
                assert found.ignore == (row["ignore"] or b"")
    assert refused > 300
