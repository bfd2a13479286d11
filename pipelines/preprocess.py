"""Labelled images to the episode store: scan, one task per shard, seal.

python -m pipelines.preprocess --dataset pascal --source data/VOC2012 --store outputs/store
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mshnet.config import ImageFormat
from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage

CODE_VERSION = 1
"""Raise it when the same source would give other shards."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a source holds, seen without opening a picture."""

    fingerprint: str
    images: int
    class_names: tuple[str, ...]
    mask_mode: str


def scan(config: CrossValidationConfig) -> Scan:
    """List the source; with generated data, generate it first where it is not there.

    Raises DatasetNotFoundError or InputError for a source that is absent or of another layout.
    """
    from mshnet.data.source import open_source

    if config.dataset == "shapes":
        from mshnet.data.shapes import is_generated, write_voc

        if "://" in config.source:
            raise InputError(f"generated pictures are written to a local folder, got {config.source!r}; give a path")
        if not is_generated(config.source):
            write_voc(config.source)
    source = open_source(config.dataset, config.source)
    images = len(source.records())
    if images == 0:
        raise InputError(f"expected labelled images under {config.source!r}, found none")
    return Scan(
        fingerprint=source.fingerprint(),
        images=images,
        class_names=source.class_names,
        mask_mode=source.mask_mode,
    )


def store_uri(config: CrossValidationConfig, scanned: Scan) -> str:
    """Where this source's images lie: one place for every fold, shot and seed."""
    key = fingerprint("images", CODE_VERSION, scanned.fingerprint, _format(config.images), config.images_per_shard)
    return storage.join(config.store, "images", f"{config.dataset}-{config.images.image_size_px}px-{key}")


def _format(images: ImageFormat) -> Mapping[str, Any]:
    return {"size": images.image_size_px, "encoding": images.encoding, "quality": images.jpeg_quality}


def stages(config: CrossValidationConfig, scanned: Scan) -> Stage:
    """The shard tasks and the one that seals the store."""
    folder = store_uri(config, scanned)
    starts = range(0, scanned.images, config.images_per_shard)
    shards = tuple(
        Stage(
            name=f"preprocess {number + 1}/{len(starts)}",
            result=storage.join(folder, "shards", f"{number:05d}.json"),
            run=preprocess_shard,
            arguments=(config, folder, start, min(start + config.images_per_shard, scanned.images), scanned.images),
            complete=_ShardIsThere(folder),
        )
        for number, start in enumerate(starts)
    )
    return Stage(
        name="seal the store",
        result=storage.join(folder, "manifest.json"),
        run=seal,
        arguments=(config, folder, scanned),
        needs=shards,
        complete=_ShardsAreThere(folder),
    )


@dataclass(frozen=True)
class _ShardIsThere:
    folder: str

    def __call__(self, result: Mapping[str, Any]) -> bool:
        return storage.size_bytes(storage.join(self.folder, result["name"])) == int(result["size_bytes"])


@dataclass(frozen=True)
class _ShardsAreThere:
    folder: str

    def __call__(self, result: Mapping[str, Any]) -> bool:
        # Another schema counts as there, so that opening it can say so instead of overwriting it.
        return all(map(_ShardIsThere(self.folder), result.get("shards", ())))


def preprocess_shard(
    config: CrossValidationConfig, folder: str, start: int, stop: int, total: int
) -> Mapping[str, Any]:
    """Encode records start..stop-1 of the source into one shard."""
    from dataclasses import asdict

    from ray.experimental import tqdm_ray

    from mshnet.data.source import open_source
    from mshnet.data.store import encode_row, write_shard

    source = open_source(config.dataset, config.source)
    records = source.records()
    if len(records) != total:
        raise InputError(
            f"expected {total} images in {config.source!r} as scanned, found {len(records)}; "
            "do not change the source while it is preprocessed, and submit again"
        )
    chosen = tqdm_ray.tqdm(records[start:stop], desc=f"images {start}..{stop - 1}", flush_interval_s=5)
    rows = [encode_row(r.image_id, r.subset, source.load(r), config.images) for r in chosen]
    counts = Counter(class_id for row in rows for class_id in row["class_ids"])
    return {**asdict(write_shard(rows, folder)), "images_per_class": {str(c): n for c, n in sorted(counts.items())}}


def seal(config: CrossValidationConfig, folder: str, scanned: Scan, *shards: Mapping[str, Any]) -> Mapping[str, Any]:
    """The store's manifest: with it the folder is a store, without it nothing is readable."""
    import json

    from mshnet.data.store import Manifest, Shard

    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update({scanned.class_names[int(c)]: n for c, n in shard["images_per_class"].items()})
    manifest = Manifest(
        dataset=config.dataset,
        source_fingerprint=scanned.fingerprint,
        class_names=scanned.class_names,
        mask_mode=scanned.mask_mode,
        format=config.images,
        shards=tuple(
            Shard(**{key: shard[key] for key in ("name", "sha256", "rows", "size_bytes")}) for shard in shards
        ),
        images_per_class=dict(counts),
    )
    result: Mapping[str, Any] = json.loads(manifest.to_json())
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocess only: the job's first stages."""
    from pipelines.job import run_stages

    return run_stages(
        argv,
        "python -m pipelines.preprocess",
        "Preprocess a labelled data set into the episode store.",
        lambda graph: [graph.sealed],
    )


if __name__ == "__main__":
    raise SystemExit(main())
