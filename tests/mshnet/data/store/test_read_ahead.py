"""Reading ahead: in order, as many as fit, in nobody's way."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mshnet.data.store.cache import Fetch, NodeCache
from mshnet.data.store.manifest import Shard
from mshnet.data.store.read_ahead import read_ahead

SIZE = 10_000
DEADLINE_S = 60.0


def made(seed: int) -> tuple[Shard, bytes]:
    data = random.Random(seed).randbytes(SIZE)
    digest = hashlib.sha256(data).hexdigest()
    return Shard(name=f"images-{digest[:16]}.arrow", sha256=digest, rows=1, size_bytes=SIZE), data


def write(data: bytes) -> Fetch:
    return lambda local_path: Path(local_path).write_bytes(data)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def idle() -> bool:
    return not any(thread.name == "read-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("held", [3, 8])
def test_in_order_as_many_as_fit(held: int, tmp_path: Path) -> None:
    shards = [made(seed) for seed in range(8)]
    fetched = []

    def fetch(number: int) -> Fetch:
        def run(local_path: str) -> None:
            fetched.append(number)
            Path(local_path).write_bytes(shards[number][1])

        return run

    read_ahead(NodeCache(tmp_path, held * SIZE), ((shard, fetch(i)) for i, (shard, _) in enumerate(shards)))
    wait_until(idle)
    assert fetched == list(range(held))
    assert {path.name for path in tmp_path.iterdir()} == {"lock", *(shard.sha256 for shard, _ in shards[:held])}


def test_what_another_fetches_is_passed_over_and_looked_at_again(tmp_path: Path) -> None:
    shards = [made(seed) for seed in range(3)]
    cache, begun, fail = NodeCache(tmp_path, 10 * SIZE), threading.Event(), threading.Event()

    def fails(local_path: str) -> None:
        begun.set()
        assert fail.wait(DEADLINE_S)
        raise ConnectionError

    def other() -> None:
        with pytest.raises(ConnectionError):
            cache.map(shards[0][0], fails)

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(DEADLINE_S)
    read_ahead(cache, [(shard, write(data)) for shard, data in shards])
    wait_until(lambda: all((tmp_path / shard.sha256).exists() for shard, _ in shards[1:]))
    assert not (tmp_path / shards[0][0].sha256).exists()
    fail.set()
    thread.join(DEADLINE_S)
    wait_until(idle)
    assert (tmp_path / shards[0][0].sha256).read_bytes() == shards[0][1]


@pytest.mark.parametrize("error", [ConnectionError("does not answer"), OSError(28, "full"), RuntimeError("ends")])
def test_what_fails_ends_it_quietly(error: Exception, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(local_path: str) -> None:
        raise error

    cache, (shard, data) = NodeCache(tmp_path, 10 * SIZE), made(0)
    read_ahead(cache, [(shard, fails), (shard, write(data))])
    wait_until(idle)
    assert capfd.readouterr().err == ""
    assert cache.map(shard, write(data))[:] == data  # whoever needs it fetches it


def test_it_can_be_stopped(tmp_path: Path) -> None:
    shards = [made(seed) for seed in range(2)]
    begun, go_on = threading.Event(), threading.Event()

    def slow(local_path: str) -> None:
        begun.set()
        assert go_on.wait(DEADLINE_S)
        Path(local_path).write_bytes(shards[0][1])

    stop = read_ahead(NodeCache(tmp_path, 10 * SIZE), [(shards[0][0], slow), (shards[1][0], write(shards[1][1]))])
    assert begun.wait(DEADLINE_S)
    stop.set()
    go_on.set()
    wait_until(idle)
    assert not (tmp_path / shards[1][0].sha256).exists()


HANGING = """
import sys, threading, time
from mshnet.data.store.cache import NodeCache
from mshnet.data.store.manifest import Shard
from mshnet.data.store.read_ahead import read_ahead

begun = threading.Event()

def hangs(local_path):
    begun.set()
    time.sleep(600)

read_ahead(NodeCache(sys.argv[1], 1000), [(Shard(name="x", sha256="0" * 64, rows=1, size_bytes=9), hangs)])
assert begun.wait(60)
"""


def test_a_fetch_that_hangs_does_not_keep_a_process_from_ending(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path)], timeout=DEADLINE_S, check=False)
    assert done.returncode == 0
