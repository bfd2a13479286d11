"""Shards fetched before they are asked for, by a thread that nothing depends on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from mshnet.data.store.cache import Fetch, NodeCache
from mshnet.data.store.manifest import Shard
from mshnet.data.store.shards import DamagedShardError
from mshnet.errors import InputError

_RETRY_S = 0.5

_log = logging.getLogger(__name__)


def read_ahead(cache: NodeCache, shards: Iterable[tuple[Shard, Fetch]]) -> threading.Event:
    """Fetch shards into the cache in a thread of its own, in order, as many as fit; returns what stops it.

    A shard that another process is fetching is passed over and looked at again. What fails is left to whoever needs
    the shard, and ends the thread.
    """
    stop = threading.Event()
    # A daemon, so that a fetch that hangs does not keep the process from ending.
    threading.Thread(target=_run, args=(cache, shards, stop), name="read-ahead", daemon=True).start()
    return stop


def _run(cache: NodeCache, shards: Iterable[tuple[Shard, Fetch]], stop: threading.Event) -> None:
    try:
        waiting, left_bytes = [], cache.room_bytes()
        for shard, fetch in shards:
            left_bytes -= shard.size_bytes
            if left_bytes < 0 or stop.is_set():
                break
            if not cache.fetch_ahead(shard, fetch):
                waiting.append((shard, fetch))
        while waiting and not stop.wait(_RETRY_S):
            waiting = [(shard, fetch) for shard, fetch in waiting if not cache.fetch_ahead(shard, fetch)]
    except (OSError, DamagedShardError, InputError, RuntimeError) as error:  # the last where the process is ending
        _log.debug("reading ahead ends: %s", error)
