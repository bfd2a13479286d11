"""Shards fetched before they are asked for, by a thread that nothing depends on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from mshnet.data.cache import Fetch, NodeCache
from mshnet.data.manifest import Shard
from mshnet.data.shards import DamagedShardError
from mshnet.errors import InputError

_RETRY_S = 0.5

_log = logging.getLogger(__name__)


def read_ahead(cache: NodeCache, shards: Iterator[Shard], fetch: Callable[[Shard], Fetch]) -> threading.Event:
    """Fetch shards into the cache in a thread of its own, in order, as many as fit; returns what stops it.

    A shard that another process is fetching is passed over and looked at again. What fails is left to whoever needs
    the shard, and ends the thread.
    """
    stop = threading.Event()
    # A daemon, so that a fetch that hangs does not keep the process from ending.
    thread = threading.Thread(target=_run, args=(cache, shards, fetch, stop), name="read-ahead", daemon=True)
    thread.start()
    return stop


def _run(cache: NodeCache, shards: Iterator[Shard], fetch: Callable[[Shard], Fetch], stop: threading.Event) -> None:
    try:
        waiting, left = [], cache.room_bytes()
        for shard in shards:
            left -= shard.size_bytes
            if left < 0 or stop.is_set():
                break
            if not cache.fetch_ahead(shard, fetch(shard)):
                waiting.append(shard)
        while waiting and not stop.wait(_RETRY_S):
            waiting = [shard for shard in waiting if not cache.fetch_ahead(shard, fetch(shard))]
    except (OSError, DamagedShardError, InputError) as error:
        _log.debug("reading ahead ends: %s", error)
