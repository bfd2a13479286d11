"""Rows: what their checksums are of, so that others can compute them."""

from __future__ import annotations

import struct
import zlib

import pytest

from mshnet.config import ImageFormat
from mshnet.data.store.rows import SCHEMA, crc32, encode_row, labels_crc32
from tests.mshnet.data.stored import PNG_65, noise_image


def test_a_row_has_the_columns_and_their_checksums() -> None:
    row = encode_row("2007_000033", "val", noise_image(0), PNG_65)
    assert list(row) == SCHEMA.names
    pixels = struct.pack("<2q", 0, 2) + row["image"] + row["masks"][0] + row["masks"][1] + row["ignore"]
    assert row["crc32"] == zlib.crc32(pixels) == crc32([0, 2], [row["image"], *row["masks"], row["ignore"]])
    labels = b"2007_000033val" + struct.pack("<6q", 50, 70, 0, 2, *row["pixels"])
    assert row["labels_crc32"] == zlib.crc32(labels) == labels_crc32(row)
    assert zlib.crc32(b"123456789") == 0xCBF43926  # the CRC-32 of zip, PNG and gzip


@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_the_same_image_gives_the_same_bytes(encoding: str) -> None:
    format = ImageFormat(image_size_px=65, encoding=encoding)  # type: ignore[arg-type]
    first, again, other = (encode_row("a", "val", noise_image(seed), format) for seed in (0, 0, 1))
    assert first == again
    assert first["image"] != other["image"]
