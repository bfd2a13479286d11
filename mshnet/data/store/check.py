"""A shard checked end to end: is it there, is it what was written, can each picture and mask be decoded."""

from __future__ import annotations

import hashlib
import mmap
import posixpath
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mshnet.data.filesystem import filesystem, is_local
from mshnet.data.store import decode
from mshnet.data.store.manifest import Manifest, Shard
from mshnet.data.store.shards import DamagedShardError, ShardIndex, map_shard, read_labels
from mshnet.data.temporary import temporary_room

MOST_PROBLEMS = 10
"""Named of one shard; a damaged one may have thousands."""


@dataclass(frozen=True)
class ShardCheck:
    """What was found in one shard."""

    problems: tuple[str, ...]
    """In words, each with what was expected and what was found; none where the shard is sound."""
    images_per_class: Mapping[int, int] = field(default_factory=dict)
    """Images that show each class, by class id."""


def check_shard(uri: str, manifest: Manifest, shard: Shard) -> ShardCheck:
    """Read one shard of the store at `uri` whole and compare it with its manifest.

    A remote one is fetched to a temporary file. Raises OSError where the place does not answer, InputError where the
    temporary folder is full.
    """
    fs, path = filesystem(posixpath.join(uri, shard.name))
    if not fs.exists(path):
        return ShardCheck((f"expected {shard.size_bytes} bytes, found none",))
    # Without a name, so that a process that is killed leaves nothing of it.
    with tempfile.TemporaryFile() as temporary:
        local = path
        if not is_local(uri):
            local = f"/dev/fd/{temporary.fileno()}"
            with temporary_room(f"the {shard.size_bytes} bytes of a shard"):
                fs.get_file(path, local)
        try:
            data = map_shard(local, shard)
        except DamagedShardError as error:
            return ShardCheck((str(error),))
        return _check(data, manifest, shard)


def _check(data: mmap.mmap, manifest: Manifest, shard: Shard) -> ShardCheck:
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.sha256:
        return ShardCheck((f"expected sha256 {shard.sha256[:12]}…, found {digest[:12]}…",))
    # What follows can only be a mistake of the writer.
    try:
        index = ShardIndex(data, shard.rows)
        labels = read_labels(data, shard.rows)
    except DamagedShardError as error:
        return ShardCheck((str(error),))
    counts: Counter[int] = Counter()
    problems: list[str] = []
    for i, facts in enumerate(labels):
        counts.update(facts["class_ids"])
        problems += _check_row(index, data, i, facts, manifest.format.image_size_px)
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
    return ShardCheck(tuple(problems), dict(sorted(counts.items())))


def _check_row(index: ShardIndex, data: mmap.mmap, i: int, facts: Mapping[str, Any], side: int) -> list[str]:
    where, size = f"row {i} ({facts['image_id']})", (facts["height"], facts["width"])
    try:
        row = index.read(data, i)
        shape = tuple(decode.picture(row).shape)
        masks = [decode.original_mask(png) for png in row.masks.values()]
        ignored = [decode.original_mask(row.ignore)] if row.ignore else []
    except DamagedShardError as error:
        return [str(error)]
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # Pillow's and torchvision's ways to say "broken"
        return [f"expected pictures that decode in {where}: {error}"]
    problems = []
    if shape != (3, side, side):
        problems.append(f"expected an image of shape {(3, side, side)} in {where}, found {shape}")
    if any(mask.shape != size for mask in masks + ignored):
        problems.append(f"expected masks of {size} in {where}, found {[mask.shape for mask in masks + ignored]}")
    pixels = [int(np.count_nonzero(mask)) for mask in masks]
    if pixels != facts["pixels"]:
        problems.append(f"expected masks of {facts['pixels']} pixels in {where}, found {pixels}")
    return problems
