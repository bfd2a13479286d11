"""The episode store's images: Arrow IPC shards under a manifest that is written last.

A row is one image at training size with one lossless mask per class at original size; masks of
different classes may overlap. Shards are uncompressed, so that they memory-map.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_image

from mshnet.config import IGNORE_INDEX, ImageFormat
from mshnet.data.files import write_atomically
from mshnet.data.source import LabelledImage
from mshnet.errors import DatasetNotFoundError, InputError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("subset", pa.string()),
        ("image", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("class_ids", pa.list_(pa.int32())),
        ("masks", pa.list_(pa.binary())),
        ("pixels", pa.list_(pa.int64())),
        ("ignore", pa.binary()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of the store, named by its content."""

    name: str
    sha256: str
    rows: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds. A folder without one is not a store."""

    dataset: str
    source_fingerprint: str
    class_names: tuple[str, ...]
    mask_mode: str
    format: ImageFormat
    shards: tuple[Shard, ...]
    images_per_class: Mapping[str, int] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Indented JSON, stable in order."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str, where: str) -> Manifest:
        """Parse. Raises InputError when the schema version is another one; unknown keys are left alone."""
        try:
            data: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise InputError(f"expected JSON in the manifest of {where!r}: {error}; preprocess again") from error
        if data.get("schema") != SCHEMA_VERSION:
            raise InputError(
                f"expected an episode store of schema version {SCHEMA_VERSION}, found {data.get('schema')!r} in "
                f"{where!r}; preprocess again into another folder, or use the version of mshnet that wrote it"
            )
        return Manifest(
            dataset=data["dataset"],
            source_fingerprint=data["source_fingerprint"],
            class_names=tuple(data["class_names"]),
            mask_mode=data["mask_mode"],
            format=ImageFormat(**_known(ImageFormat, data["format"])),
            shards=tuple(Shard(**_known(Shard, shard)) for shard in data["shards"]),
            images_per_class=data["images_per_class"],
        )


def _known(kind: type[ImageFormat | Shard], data: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: data[f.name] for f in fields(kind) if f.name in data}


def encode_row(image_id: str, subset: str, labelled: LabelledImage, format: ImageFormat) -> dict[str, Any]:
    """One row of a shard: the image resized (bilinear, square), its masks as they are."""
    height, width = labelled.image.shape[:2]
    side = format.image_size_px
    picture = Image.fromarray(labelled.image).resize((side, side), Image.Resampling.BILINEAR)
    options = {"quality": format.jpeg_quality, "subsampling": 0} if format.encoding == "jpeg" else {}
    class_ids = sorted(labelled.masks)
    return {
        "image_id": image_id,
        "subset": subset,
        "image": _encoded(picture, format.encoding, **options),
        "height": height,
        "width": width,
        "class_ids": class_ids,
        "masks": [_mask_png(labelled.masks[c]) for c in class_ids],
        "pixels": [int(labelled.masks[c].sum()) for c in class_ids],
        "ignore": None if labelled.ignore is None else _mask_png(labelled.ignore),
    }


def _encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def _mask_png(mask: Bool[np.ndarray, "H W"]) -> bytes:
    return _encoded(Image.fromarray(mask.astype(np.uint8) * 255).convert("1"), "png")


def write_shard(rows: Iterable[Mapping[str, Any]], folder: str) -> Shard:
    """Write rows as one shard under its content's name; a file of that name already there is the same file."""
    batch = pa.RecordBatch.from_pylist(list(rows), schema=SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    data = sink.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    shard = Shard(name=f"images-{digest[:16]}.arrow", sha256=digest, rows=batch.num_rows, size_bytes=data.size)
    write_atomically(posixpath.join(folder, shard.name), memoryview(data))
    return shard


class ImageStore:
    """Random access to a sealed store by row. Cheap to open, safe to pickle, read-only.

    Raises DatasetNotFoundError without a manifest, InputError on another schema version or a shard
    that is missing or of another size (`verify` also checks every hash).
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        fs, root = fsspec.core.url_to_fs(uri)
        try:
            text = fs.cat_file(posixpath.join(root, MANIFEST)).decode()
        except FileNotFoundError as error:
            raise DatasetNotFoundError(
                f"no episode store under {uri!r} (looked for {MANIFEST}); preprocess first, or finish the preprocessing"
            ) from error
        self.manifest = Manifest.from_json(text, uri)
        for shard in self.manifest.shards:
            path = posixpath.join(root, shard.name)
            size = fs.size(path) if fs.exists(path) else None
            if size != shard.size_bytes:
                raise InputError(
                    f"expected shard {shard.name} of {shard.size_bytes} bytes, found "
                    f"{'none' if size is None else f'{size} bytes'} in {uri!r}; delete the shard and preprocess again"
                )
        self._open()

    def _open(self) -> None:
        self._batches = [_memory_map(posixpath.join(self.uri, shard.name)) for shard in self.manifest.shards]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        ids = [image_id for batch in self._batches for image_id in batch.column("image_id").to_pylist()]
        self._row = {image_id: row for row, image_id in enumerate(ids)}
        self.image_ids = ids

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.image_ids)

    def verify(self) -> None:
        """Check every shard's hash. Raises InputError naming the first damaged one."""
        for shard in self.manifest.shards:
            with fsspec.open(posixpath.join(self.uri, shard.name), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                raise InputError(
                    f"expected sha256 {shard.sha256[:12]}… for shard {shard.name}, found {digest[:12]}… in "
                    f"{self.uri!r}; delete the shard and preprocess again"
                )

    def row(self, image_id: str) -> int:
        """The row of an image. Raises InputError for one that the store does not hold."""
        try:
            return self._row[image_id]
        except KeyError:
            raise InputError(
                f"expected image {image_id!r} in the store {self.uri!r}, found none of that name among {len(self)}; "
                "give split lists made for this source"
            ) from None

    def contents(self) -> list[tuple[str, str, dict[int, int]]]:
        """(image id, subset, original pixels per class) of every image, in row order."""
        rows = []
        for batch in self._batches:
            table = pa.Table.from_batches([batch]).select(["image_id", "subset", "class_ids", "pixels"])
            rows += [
                (r["image_id"], r["subset"], dict(zip(r["class_ids"], r["pixels"], strict=True)))
                for r in table.to_pylist()
            ]
        return rows

    def image(self, row: int) -> UInt8[Tensor, "3 S S"]:
        """The picture at training size, RGB."""
        batch, i = self._locate(row)
        return _decode(batch.column("image")[i], ImageReadMode.RGB)

    def mask(self, row: int, class_id: int, with_ignore: bool = False) -> UInt8[Tensor, "S S"]:
        """1 where the class is, 0 elsewhere, at training size by nearest neighbour from the original.

        With `with_ignore`, 255 where the data set says so. An image without the class gives zeros.
        """
        batch, i = self._locate(row)
        original = torch.zeros(batch.column("height")[i].as_py(), batch.column("width")[i].as_py(), dtype=torch.uint8)
        class_ids = batch.column("class_ids")[i].as_py()
        if class_id in class_ids:
            png = batch.column("masks")[i][class_ids.index(class_id)]
            original = (_decode(png, ImageReadMode.GRAY)[0] > 127).to(torch.uint8)
        ignore = batch.column("ignore")[i]
        if with_ignore and ignore.is_valid:
            original = original.masked_fill(_decode(ignore, ImageReadMode.GRAY)[0] > 127, IGNORE_INDEX)
        side = self.manifest.format.image_size_px
        return F.interpolate(original[None, None], size=(side, side), mode="nearest")[0, 0]

    def _locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[shard], row - int(self._starts[shard])


def _memory_map(uri: str) -> pa.RecordBatch:
    # Remote shards are fetched whole, once per process; a local path comes back as it is.
    path = uri if "://" not in uri else fsspec.open_local(f"simplecache::{uri}")
    return pa.ipc.open_file(pa.memory_map(str(path).removeprefix("file://"))).get_batch(0)


def _decode(value: Any, mode: ImageReadMode) -> Tensor:
    # The copy is of the compressed bytes only; torch wants memory that it may write to.
    data: Tensor = decode_image(torch.frombuffer(bytearray(value.as_buffer()), dtype=torch.uint8), mode)
    return data
