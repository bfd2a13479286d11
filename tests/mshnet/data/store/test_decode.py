"""Decoding: masks resized exactly as torch does it, at any size."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as by_torchvision

from mshnet.data.source import LabelledImage
from mshnet.data.store import decode
from mshnet.data.store.rows import encode_row
from mshnet.data.store.shards import EncodedRow
from tests.mshnet.data.stored import PNG_65, noise_image


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(33, 500), st.integers(0, 2**32 - 1))
@example(640, 480, 473, 0)
@example(375, 500, 417, 1)
@example(1, 1, 33, 2)
def test_nearest_is_torchs(height: int, width: int, side: int, seed: int) -> None:
    mask = np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8)
    expected = F.interpolate(torch.from_numpy(mask)[None, None], size=(side, side), mode="nearest")[0, 0]
    found = np.zeros((side, side), np.uint8)
    decode.mark(found, np.packbits(mask, axis=1), width, 1)
    assert torch.equal(torch.from_numpy(found), expected)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1), st.booleans(), st.integers(0, 2**32 - 1))
def test_masks_are_lossless(height: int, width: int, share: float, transposed: bool, seed: int) -> None:
    """Of any size, also laid out by columns, as pycocotools gives them; for other decoders too."""
    rng = np.random.default_rng(seed)
    noise = rng.random((width, height)).T if transposed else rng.random((height, width))
    mask = noise < share
    image = LabelledImage(image=np.zeros((height, width, 3), np.uint8), masks={3: mask}, ignore=~mask)
    row = encode_row("a", "train", image, PNG_65)
    assert row["pixels"] == [mask.sum()]
    for png, expected in ((row["masks"][0], mask), (row["ignore"], ~mask)):
        found = decode.original_mask(png)
        np.testing.assert_array_equal(found != 0, expected)
        tensor = by_torchvision(torch.frombuffer(bytearray(png), dtype=torch.uint8), ImageReadMode.GRAY)
        np.testing.assert_array_equal(tensor[0].numpy() > 127, expected)
        assert Image.open(io.BytesIO(png)).mode == "1"


def unfiltered_png(mask: np.ndarray, parts: int) -> bytes:
    """A 1-bit PNG without filters, its pixels cut into chunks."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = mask.shape
    data = zlib.compress(np.pad(np.packbits(mask, axis=1), ((0, 0), (1, 0))))
    cuts = [len(data) * i // parts for i in range(parts + 1)]
    chunks = [chunk(b"IDAT", data[begin:end]) for begin, end in pairwise(cuts)]
    head = struct.pack(">II5B", width, height, 1, 0, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), *chunks, chunk(b"IEND", b"")])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_masks_without_filters_are_read_as_well(height: int, width: int, share: float, parts: int, seed: int) -> None:
    """Those that need no PNG decoder, and those that look like it but lie in two chunks."""
    mask = np.random.default_rng(seed).random((height, width)) < share
    png = unfiltered_png(mask, parts)
    np.testing.assert_array_equal(decode.original_mask(png) != 0, mask)  # it is a PNG
    packed, found = decode.packed_mask(png)
    assert found == width
    np.testing.assert_array_equal(np.unpackbits(packed, axis=1)[:, :width], mask)


@pytest.mark.parametrize("with_ignore", [False, True])
def test_values_of_a_mask(with_ignore: bool) -> None:
    labelled = noise_image(0)
    row = encode_row("a", "train", labelled, PNG_65)
    encoded = EncodedRow(bytearray(row["image"]), dict(zip(row["class_ids"], row["masks"], strict=True)), row["ignore"])
    found = decode.mask(encoded, 2, 65, with_ignore)
    assert found.dtype == torch.uint8
    assert found.unique().tolist() == ([0, 1, 255] if with_ignore else [0, 1])
    absent = decode.mask(encoded, 1, 65, with_ignore)
    assert absent.unique().tolist() == ([0, 255] if with_ignore else [0])
    found[0, 0] = 7  # memory of its own: what is read may be written to
