"""Sealed stores checked end to end, and mended: `python -m pipelines.preprocess --verify` and `--repair`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mshnet.errors import InputError
from pipelines import dag, preprocess, scan, storage
from pipelines.cluster import connected
from pipelines.config import CrossValidationConfig
from pipelines.preprocess import MANIFEST, SHARDS

if TYPE_CHECKING:
    from mshnet.data.store.manifest import Manifest


def verify(config: CrossValidationConfig) -> list[Mapping[str, Any]]:
    """Every sealed store of this data set and image size, looked at by Ray tasks; what each one holds.

    Raises InputError, naming every shard that is wrong, or where there is no such store.
    """
    images = storage.join(config.store, "images")
    stores = [uri for uri in storage.folders_with(images, MANIFEST) if _name(uri).startswith(preprocess.prefix(config))]
    if not stores:
        raise InputError(
            f"expected a sealed store {preprocess.prefix(config)}* below {images!r}, found none; preprocess first, or "
            "give the --dataset, --image-size-px and --store that it was made with"
        )
    with connected(config.compute.ray_address):
        problems = {uri: _problems(uri, _manifest(uri)) for uri in stores}
    if any(problems.values()):
        found = "\n".join(f"  {uri}: {line}" for uri, of_store in problems.items() for line in of_store.values())
        raise InputError(f"expected whole stores, found:\n{found}\nrun the same command with --repair instead")
    return [_summary(uri) for uri in stores]


def repair(config: CrossValidationConfig) -> list[Mapping[str, Any]]:
    """This source's store, its failing shards made anew. Other shards are left as they are."""
    scan.check(config)
    storage.check_writable(config.store)
    with connected(config.compute.ray_address):
        scanned = scan.scan(config)
        uri = preprocess.store_uri(config, scanned)
        if storage.size_bytes(storage.join(uri, MANIFEST)) is None:
            raise InputError(f"expected a sealed store to repair, found none at {uri!r}; preprocess without --repair")
        damaged = _problems(uri, _manifest(uri))
        for number, name in damaged:
            storage.remove(storage.join(uri, name))
            storage.remove(storage.join(uri, SHARDS, f"{number:05d}.json"))
        if damaged:
            dag.execute([preprocess.stages(config, scanned, replace=True)])
            left = _problems(uri, _manifest(uri))
            if left:
                raise InputError(f"the store {uri!r} is still not whole: {'; '.join(left.values())}")
    return [{**_summary(uri), "repaired": [name for _, name in damaged]}]


def _problems(uri: str, manifest: Manifest) -> dict[tuple[int, str], str]:
    """What is wrong, by place and name of the shard."""
    from mshnet.data.store.check import check_shard

    calls = [(uri, manifest, shard) for shard in manifest.shards]
    reports = dag.each(check_shard, calls, f"verify {_name(uri)}")
    found = {
        (number, shard.name): f"shard {shard.name}: {'; '.join(report.problems)}"
        for number, (shard, report) in enumerate(zip(manifest.shards, reports, strict=True))
        if report.problems
    }
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update({manifest.class_names[c]: n for c, n in report.images_per_class.items()})
    if not found and dict(counts) != dict(manifest.images_per_class):
        raise InputError(
            f"the shards of {uri!r} are whole, but its manifest counts other images per class than they hold; "
            f"delete {storage.join(uri, MANIFEST)!r} and preprocess again: the shards are kept"
        )
    return found


def _manifest(uri: str) -> Manifest:
    from mshnet.data.store.manifest import Manifest

    return Manifest.from_json(storage.read_bytes(storage.join(uri, MANIFEST)).decode(errors="replace"), uri)


def _summary(uri: str) -> Mapping[str, Any]:
    return preprocess.summary(uri, [asdict(shard) for shard in _manifest(uri).shards])


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]
