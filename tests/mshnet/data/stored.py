"""Small episode stores, sealed as the preprocessing seals them, from hand-made images."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

import numpy as np

from mshnet.config import ImageFormat
from mshnet.data.files import write_atomically
from mshnet.data.source import LabelledImage
from mshnet.data.store.images import ImageStore
from mshnet.data.store.manifest import MANIFEST, Manifest
from mshnet.data.store.rows import encode_row
from mshnet.data.store.shards import write_shard

PNG_65 = ImageFormat(image_size_px=65, encoding="png")


def write_store(
    uri: str, images: Mapping[str, LabelledImage], format: ImageFormat = PNG_65, images_per_shard: int = 3
) -> ImageStore:
    """A sealed store of the images in the given order, opened."""
    rows = [encode_row(image_id, "train", labelled, format) for image_id, labelled in images.items()]
    shards = [write_shard(rows[i : i + images_per_shard], uri) for i in range(0, len(rows), images_per_shard)]
    manifest = Manifest(
        dataset="shapes",
        source_fingerprint="f" * 64,
        class_names=("disc", "bar", "ring"),
        mask_mode="drawn by hand",
        format=format,
        shards=tuple(shards),
        images_per_class={"disc": len(rows)},
    )
    write_atomically(posixpath.join(uri, MANIFEST), manifest.to_json().encode())
    return ImageStore(uri)


def noise_image(seed: int, height: int = 50, width: int = 70) -> LabelledImage:
    """Noise on which a brighter rectangle is class 0, one that overlaps it class 2; a line is ignored."""
    rng = np.random.default_rng(seed)
    first, second = np.zeros((2, height, width), dtype=bool)
    top, left = int(rng.integers(4, height // 3)), int(rng.integers(4, width // 3))
    first[top : top + height // 2, left : left + width // 2] = True
    second[top + 7 :, left + 9 : left + width // 3] = True
    ignore = np.zeros((height, width), dtype=bool)
    ignore[:, left - 2 : left + 1] = True
    image = rng.integers(0, 128, (height, width, 3), dtype=np.uint8)
    image[first] += 100
    return LabelledImage(image=image, masks={2: second, 0: first}, ignore=ignore)
