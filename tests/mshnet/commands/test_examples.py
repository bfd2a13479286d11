"""Labelled examples from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mshnet.commands.examples import read_examples
from mshnet.errors import InputError
from mshnet.predict import Segmenter


def test_pictures_and_masks_are_upright_whichever_way_they_are_stored(tmp_path: Path) -> None:
    stored = np.zeros((20, 30, 3), dtype=np.uint8)
    stored[:10, :15] = (250, 0, 0)
    marked = stored[..., 0] > 0
    exif = Image.Exif()
    exif[0x0112] = 6  # a telephone held upright
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(marked).save(tmp_path / "as_stored.png")
    Image.fromarray(np.rot90(marked, -1)).save(tmp_path / "as_seen.png")
    pairs = [(str(tmp_path / "a.png"), str(tmp_path / name)) for name in ("as_stored.png", "as_seen.png")]
    images, masks = read_examples(pairs)
    for image, mask in zip(images, masks, strict=True):
        assert image.shape == (30, 20, 3)
        assert np.array_equal(mask, image[..., 0] > 0)


def test_no_examples_and_no_registry() -> None:
    with pytest.raises(InputError, match="expected one or more examples"):
        read_examples([])
    with pytest.raises(InputError, match="no model under 's3' "):
        Segmenter.open("s3")
    with pytest.raises(InputError, match="unheard"):
        Segmenter.open("unheard:/NAME/1")
