"""Sealed stores checked end to end, and mended: `python -m pipelines.preprocess --verify` and `--repair`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mshnet.errors import InputError
from pipelines import dag, job, preprocess, scan, storage
from pipelines.cluster import connected
from pipelines.config import CrossValidationConfig
from pipelines.preprocess import IMAGES, MANIFEST, SHARDS
from pipelines.scan import Scan

if TYPE_CHECKING:
    from mshnet.data.store.manifest import Manifest

LOG = logging.getLogger(__name__)


def verify(config: CrossValidationConfig) -> list[Mapping[str, Any]]:
    """Every sealed store of this data set, looked at by Ray tasks; what each one holds.

    Raises InputError, naming every shard that is wrong, or where there is no such store.
    """
    storage.check_readable(config.store)
    stores = _sealed(config)
    if not stores:
        raise InputError(
            f"expected a sealed store {config.dataset}-* below {storage.join(config.store, IMAGES)!r}, found none; "
            "preprocess first, or give the --dataset and --store that it was made with"
        )
    problems: dict[str, list[str]] = {}
    with connected(config.compute.ray_address):
        for uri in stores:
            try:
                problems[uri] = list(_problems(uri, _manifest(uri)).values())
            except InputError as error:  # the other stores are looked at all the same
                problems[uri] = [str(error)]
    if any(problems.values()):
        found = "\n".join(f"  {uri}: {line}" for uri, lines in problems.items() for line in lines)
        raise InputError(
            f"expected whole stores, found:\n{found}\nmend shards with --repair instead of --verify, and the "
            "--dataset, --source and --store that they were made with"
        )
    return [_summary(uri) for uri in stores]


def repair(config: CrossValidationConfig) -> list[Mapping[str, Any]]:
    """Every sealed store of this source, its failing shards made anew. Other shards are left as they are."""
    scan.check(config)
    storage.check_writable(config.store)
    with job.joined(config, trains=False):
        scanned = scan.scan(config)
        sealed = _sealed(config)
        stores = [uri for uri in sealed if _is_of(uri, scanned)]
        if not stores:
            raise InputError(
                f"expected a sealed store of {config.source!r} to repair, found none of the {len(sealed)} below "
                f"{storage.join(config.store, IMAGES)!r}; preprocess without --repair"
            )
        return [{**_summary(uri), "repaired": _repair(config, scanned, uri)} for uri in stores]


def _is_of(uri: str, scanned: Scan) -> bool:
    try:
        return _manifest(uri).source_fingerprint == scanned.fingerprint
    except InputError as error:  # another schema's, or damaged: the other stores are mended all the same
        LOG.warning("left alone: %s", error)
        return False


def _repair(config: CrossValidationConfig, scanned: Scan, uri: str) -> list[str]:
    manifest = _manifest(uri)
    damaged = _problems(uri, manifest)
    for number, name in damaged:
        storage.remove(storage.join(uri, name))
        storage.remove(storage.join(uri, SHARDS, f"{number:05d}.json"))
    if damaged:
        # All shards but the last hold equally many.
        as_made = replace(config, images=manifest.format, images_per_shard=manifest.shards[0].rows)
        dag.execute([preprocess.stages(as_made, scanned, mend=uri)])
        left = _problems(uri, _manifest(uri))
        if left:
            raise InputError(f"the store {uri!r} is still not whole: {'; '.join(left.values())}")
    return [name for _, name in damaged]


def _sealed(config: CrossValidationConfig) -> list[str]:
    found = storage.folders_with(storage.join(config.store, IMAGES), MANIFEST)
    # Of dataset coco, not of coco-json.
    return [uri for uri in found if re.match(rf"{config.dataset}-\d", _name(uri))]


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

    return Manifest.from_json(storage.read_bytes(storage.join(uri, MANIFEST)), uri)


def _summary(uri: str) -> Mapping[str, Any]:
    return preprocess.summary(uri, [asdict(shard) for shard in _manifest(uri).shards])


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]
