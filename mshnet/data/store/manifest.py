"""What a store says about itself: the manifest, written last. Loads no torch, so that commands stay quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import msgspec

from mshnet.config import ImageFormat
from mshnet.errors import InputError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
# Whoever reads a manifest opens files of these names.
_Name = Annotated[str, msgspec.Meta(pattern=r"^images-[0-9a-f]{16}\.arrow\Z")]
_Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of the store, named by its content."""

    name: _Name
    sha256: _Sha256
    rows: _Count
    size_bytes: _Count


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds. A folder without one is not a store."""

    dataset: str
    source_fingerprint: str
    class_names: tuple[str, ...]
    mask_mode: str
    format: ImageFormat
    shards: tuple[Shard, ...]
    images_per_class: Mapping[str, int]
    schema: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Indented JSON, stable in order."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: bytes | str, where: str) -> Manifest:
        """Parse. Raises InputError for a damaged one and for another schema version; unknown keys are left alone."""
        mending = f"delete {MANIFEST} there and preprocess again: whole shards are kept"
        try:
            data = msgspec.convert(json.loads(text), dict[str, Any])
        except (ValueError, RecursionError) as error:
            raise InputError(f"expected JSON in the manifest of {where!r}: {error}; {mending}") from error
        if data.get("schema") != SCHEMA_VERSION:
            raise InputError(
                f"expected an episode store of schema version {SCHEMA_VERSION}, found {data.get('schema')!r} in "
                f"{where!r}; preprocess again into another folder, or use the version of mshnet that wrote it"
            )
        try:
            manifest = msgspec.convert(data, Manifest)
        except msgspec.ValidationError as error:
            raise InputError(f"expected a whole manifest in {where!r}, found another: {error}; {mending}") from error
        # The format's defaults are for who preprocesses: a store says what it has.
        if missing := [f.name for f in fields(ImageFormat) if f.name not in data["format"]]:
            raise InputError(
                f"expected {', '.join(missing)} in the manifest's format in {where!r}, found none; {mending}"
            )
        return manifest
