"""Labelled images to the episode store: scan, one task per shard, seal.

python -m pipelines.preprocess --dataset pascal --source data/VOC2012 --store outputs/store
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mshnet.config import ImageFormat
from mshnet.data.filesystem import is_local
from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import CrossValidationConfig, JobArguments, fingerprint
from pipelines.dag import Stage
from pipelines.scan import Scan, opened, read_records

if TYPE_CHECKING:
    from mshnet.data.source import ImageRecord, LabelledImage, Source
    from pipelines.graph import Graph

CODE_VERSION = 3
"""Raise it when the same source would give other shards."""
IMAGES = "images"
MANIFEST = "manifest.json"
SHARDS = "shards"
READERS = 8
"""Threads of a shard task that fetch pictures from a remote source."""


@dataclass(frozen=True, kw_only=True)
class PreprocessArguments(JobArguments):
    """What `python -m pipelines.preprocess` takes."""

    verify: bool = False
    """Check the sealed stores of this data set under --store end to end: hashes, counts, every picture and mask.
    Needs no source; ends with 1 where something is wrong."""
    repair: bool = False
    """Check the sealed stores of this source under --store likewise, and make the shards that fail anew."""

    def __post_init__(self) -> None:
        if self.verify + self.repair + self.dry_run > 1:
            raise InputError("--verify, --repair and --dry-run are three things to do: give one of them")


def store_uri(config: CrossValidationConfig, scanned: Scan) -> str:
    """Where this source's images lie: one place for every fold, shot and seed."""
    key = fingerprint("images", CODE_VERSION, scanned.fingerprint, _format(config.images), config.images_per_shard)
    return storage.join(config.store, IMAGES, f"{config.dataset}-{config.images.image_size_px}px-{key}")


def _format(images: ImageFormat) -> Mapping[str, Any]:
    return {"size": images.image_size_px, "encoding": images.encoding, "quality": images.jpeg_quality}


def stages(config: CrossValidationConfig, scanned: Scan, mend: str = "") -> Stage:
    """The shard tasks and the one that seals the store; `mend` is one to write over, manifest and all."""
    folder = mend or store_uri(config, scanned)
    starts = range(0, scanned.images, config.images_per_shard)
    shards = tuple(
        _shard_stage(config, scanned, folder, f"{number + 1}/{len(starts)}", start)
        for number, start in enumerate(starts)
    )
    return Stage(
        name="seal the store",
        result=storage.join(folder, MANIFEST),
        run=seal,
        arguments=(config, folder, scanned),
        needs=shards,
        complete=_ShardsAreThere(folder),
        exclusive=not mend,
    )


def _shard_stage(config: CrossValidationConfig, scanned: Scan, folder: str, label: str, start: int) -> Stage:
    stop = min(start + config.images_per_shard, scanned.images)
    return Stage(
        name=f"preprocess {label}",
        result=storage.join(folder, SHARDS, f"{start // config.images_per_shard:05d}.json"),
        run=preprocess_shard,
        arguments=(config, folder, scanned, start, stop),
        complete=_ShardIsThere(folder),
        holds=_ShardIsWhole(folder),
        spread=True,
        images=stop - start,
    )


@dataclass(frozen=True)
class _ShardIsThere:
    folder: str

    def __call__(self, result: Mapping[str, Any]) -> bool:
        return storage.size_bytes(storage.join(self.folder, result["name"])) == int(result["size_bytes"])


@dataclass(frozen=True)
class _ShardIsWhole:
    folder: str

    def __call__(self, result: Mapping[str, Any]) -> bool:
        digest: str = result["sha256"]
        return storage.sha256(storage.join(self.folder, result["name"])) == digest


@dataclass(frozen=True)
class _ShardsAreThere:
    folder: str

    def __call__(self, result: Mapping[str, Any]) -> bool:
        # A manifest of another schema or a damaged one counts as there, so that opening it can say so.
        sizes = storage.sizes(self.folder)
        return all(sizes.get(shard.get("name")) == shard.get("size_bytes") for shard in result.get("shards", ()))


def preprocess_shard(
    config: CrossValidationConfig, folder: str, scanned: Scan, start: int, stop: int
) -> Mapping[str, Any]:
    """Encode records start..stop-1 of the source into one shard, a few images in memory at a time."""
    from mshnet.data.store.rows import encode_row
    from mshnet.data.store.shards import write_shard

    source = opened(config)
    counts: Counter[int] = Counter()

    def rows() -> Iterator[Mapping[str, Any]]:
        for record, labelled in _loaded(source, read_records(config, scanned, start, stop)):
            row = encode_row(record.image_id, record.subset, labelled, config.images)
            counts.update(row["class_ids"])
            yield row

    shard = write_shard(rows(), folder)
    return {**asdict(shard), "images_per_class": {str(c): n for c, n in sorted(counts.items())}}


def _loaded(source: Source, records: Iterable[ImageRecord]) -> Iterator[tuple[ImageRecord, LabelledImage]]:
    """Images in order; those of a remote source are fetched some ahead, as each one costs a round trip."""
    if is_local(source.root):
        for record in records:
            yield record, source.load(record)
        return
    waiting: deque[tuple[ImageRecord, Future[LabelledImage]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for record in records:
            waiting.append((record, pool.submit(source.load, record)))
            if len(waiting) > READERS:
                first, loading = waiting.popleft()
                yield first, loading.result()
        for first, loading in waiting:
            yield first, loading.result()


def seal(config: CrossValidationConfig, folder: str, scanned: Scan, *shards: Mapping[str, Any]) -> Mapping[str, Any]:
    """The store's manifest: with it the folder is a store, without it nothing is readable."""
    import json

    from mshnet.data.store.manifest import Manifest, Shard

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
    storage.remove_orphans(folder)
    result: Mapping[str, Any] = json.loads(manifest.to_json())
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Preprocess only: the job's first stages, or a check of what they made."""
    from pipelines import job, verify
    from pipelines.config import parse

    prog, description = "python -m pipelines.preprocess", "Preprocess a labelled data set into the episode store."
    arguments = parse(PreprocessArguments, argv, prog, description)

    def results() -> Any:
        config = job.resolved(arguments.cross_validation)
        if arguments.repair:
            return verify.repair(config)
        return verify.verify(config) if arguments.verify else _sealed(config, arguments.dry_run)

    return job.report(results, prog)


def _sealed(config: CrossValidationConfig, dry_run: bool) -> Mapping[str, Any]:
    from pipelines import job

    stores: list[str] = []

    def wanted(graph: Graph) -> list[Stage]:
        stores[:] = [graph.sealed.folder]
        return [graph.sealed]

    (result,) = job.run(config, dry_run, wanted)
    return result if dry_run else summary(stores[0], result["shards"])


def summary(uri: str, shards: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What a sealed store holds, for whoever ran a command on it."""
    return {
        "store": uri,
        "shards": len(shards),
        "images": sum(shard["rows"] for shard in shards),
        "size_bytes": sum(shard["size_bytes"] for shard in shards),
    }


if __name__ == "__main__":
    raise SystemExit(main())
