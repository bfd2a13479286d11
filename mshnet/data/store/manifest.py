"""What a store says about itself: the manifest, written last. Loads no torch, so that commands stay quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mshnet.config import ImageFormat
from mshnet.errors import InputError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"


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
