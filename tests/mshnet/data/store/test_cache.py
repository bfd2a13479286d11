"""The node's cache under many processes, kills, full disks and damage: what it gives is right, and it stays small."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mshnet.data.store import cache as cache_module
from mshnet.data.store.cache import DIRECTORY, LIMIT, NodeCache
from mshnet.data.store.manifest import Shard
from mshnet.data.store.shards import DamagedShardError
from mshnet.errors import InputError

SIZE = 50_000
DEADLINE_S = 60.0


def shard_of(data: bytes) -> Shard:
    digest = hashlib.sha256(data).hexdigest()
    return Shard(name=f"images-{digest[:16]}.arrow", sha256=digest, rows=1, size_bytes=len(data))


@pytest.fixture
def remote(tmp_path: Path) -> list[tuple[Shard, Path]]:
    """Eight shards somewhere far away."""
    shards = []
    for seed in range(8):
        data = random.Random(seed).randbytes(SIZE)
        path = tmp_path / "remote" / str(seed)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        shards.append((shard_of(data), path))
    return shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def copy(source: Path) -> Callable[[str], object]:
    return lambda local_path: shutil.copyfile(source, local_path)


def never(local_path: str) -> None:
    raise AssertionError("fetched again")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def used_bytes(folder: Path) -> int:
    """Under the lock of evictions, or one file's end and another's beginning would be counted together."""
    with open(folder / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = {}
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # renamed since it was listed
                sizes[path.stat().st_ino] = path.stat().st_size
    return sum(sizes.values())


def age(folder: Path, shard: Shard, seconds: float) -> None:
    """As if last used so long ago."""
    then = time.time() - seconds
    os.utime(folder / shard.sha256, (then, then))


def test_fetched_once_and_then_there(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    cache = NodeCache(folder, 10 * SIZE)
    for shard, path in remote:
        assert cache.map(shard, copy(path))[:] == path.read_bytes()
    for shard, path in remote:
        assert NodeCache(folder, 10 * SIZE).map(shard, never)[:] == path.read_bytes()
        assert cache.fetch_ahead(shard, never)
    assert names(folder) == sorted(shard.sha256 for shard, _ in remote)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_least_recently_used_goes_first(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    cache = NodeCache(folder, 3 * SIZE)
    for i, (shard, path) in enumerate(remote[:3]):
        cache.map(shard, copy(path))
        age(folder, shard, 1000 - i)
    first = cache.map(remote[0][0], never)  # the oldest, used again
    cache.map(remote[3][0], copy(remote[3][1]))
    assert names(folder) == sorted(remote[i][0].sha256 for i in (0, 2, 3))
    for shard, path in remote[4:]:
        cache.map(shard, copy(path))
    assert remote[0][0].sha256 not in names(folder)
    assert first[:] == remote[0][1].read_bytes()  # what is evicted stays good for who has it


def test_a_limit_below_one_shard_holds_one(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    cache = NodeCache(folder, 10)
    for shard, path in remote:
        assert cache.map(shard, copy(path))[:] == path.read_bytes()
        assert names(folder) == [shard.sha256]


def test_other_files_are_left_alone(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_bytes(bytes(SIZE))
    (folder / "of-mine").mkdir()
    cache = NodeCache(folder, SIZE)
    for shard, path in remote:
        cache.map(shard, copy(path))
    assert names(folder) == sorted(["thesis.tex", "of-mine", remote[-1][0].sha256])


def test_what_arrives_damaged_is_refused(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    cache = NodeCache(folder, 10 * SIZE)
    shard, path = remote[0]
    data = bytearray(path.read_bytes())
    data[1234] ^= 4
    path.write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    with pytest.raises(DamagedShardError, match=f"expected sha256 {shard.sha256[:12]}…, found {found[:12]}…"):
        cache.map(shard, copy(path))
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedShardError, match=f"expected {SIZE} bytes, found {SIZE - 1}"):
        cache.map(shard, copy(path))
    path.unlink()
    with pytest.raises(DamagedShardError, match=f"expected {SIZE} bytes, found none"):
        cache.fetch_ahead(shard, copy(path))
    assert names(folder) == []


def test_a_truncated_or_dropped_copy_is_fetched_again(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    cache = NodeCache(folder, 10 * SIZE)
    shard, path = remote[0]
    cache.map(shard, copy(path))
    with open(folder / shard.sha256, "r+b") as file:
        file.truncate(SIZE // 2)
    assert cache.map(shard, copy(path))[:] == path.read_bytes()
    cache.drop(shard)
    cache.drop(shard)
    assert cache.map(shard, copy(path))[:] == path.read_bytes()


def test_a_folder_that_was_cleaned_away_is_made_again(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    cache = NodeCache(folder, 10 * SIZE)
    shutil.rmtree(folder)
    shard, path = remote[0]
    assert cache.map(shard, copy(path))[:] == path.read_bytes()


def test_a_failed_fetch_leaves_nothing(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    def fails(local_path: str) -> None:
        Path(local_path).write_bytes(b"half")
        raise ConnectionError("the store does not answer")

    cache = NodeCache(folder, 10 * SIZE)
    with pytest.raises(ConnectionError, match="does not answer"):
        cache.map(remote[0][0], fails)
    assert names(folder) == []


def full_for(times: int, source: Path) -> Callable[[str], object]:
    """A disk that is full after the first half, so many times."""
    left = [times]

    def fetch(local_path: str) -> None:
        if left[0]:
            left[0] -= 1
            Path(local_path).write_bytes(source.read_bytes()[: SIZE // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        shutil.copyfile(source, local_path)

    return fetch


def test_a_full_disk_costs_the_least_recently_used(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    cache = NodeCache(folder, 10 * SIZE)
    for i, (shard, path) in enumerate(remote[:4]):
        cache.map(shard, copy(path))
        age(folder, shard, 1000 - i)
    shard, path = remote[4]
    assert cache.map(shard, full_for(2, path))[:] == path.read_bytes()
    assert names(folder) == sorted(remote[i][0].sha256 for i in (2, 3, 4))


def test_a_disk_full_of_other_things_is_said(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    cache = NodeCache(folder, 10 * SIZE)
    cache.map(remote[0][0], copy(remote[0][1]))
    shard, path = remote[1]
    with pytest.raises(InputError, match=rf"expected {SIZE} bytes free .* in the cache '.*', found \d+; .*{DIRECTORY}"):
        cache.map(shard, full_for(5, path))
    assert names(folder) == []
    assert cache.map(shard, copy(path))[:] == path.read_bytes()  # once there is space again


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of its own, of 1 MiB, of which a share is kept free."""
    monkeypatch.setattr(cache_module, "FREE_SHARE", 0.05)
    mount = tmp_path / "disk"
    mount.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    options = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)]
    if not mounted or subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_small_disk_is_never_filled(remote: list[tuple[Shard, Path]], small_disk: Path) -> None:
    cache = NodeCache(small_disk / "cache", 2**40)
    for shard, path in remote * 4:
        assert cache.map(shard, copy(path))[:] == path.read_bytes()
        assert shutil.disk_usage(small_disk).free >= 0.05 * 2**20
    held = len(names(small_disk / "cache"))
    assert held == len(remote)
    # Somebody else fills it up: shards make way, one by one, and go on being read.
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - SIZE // 2))
    data = random.Random(9).randbytes(SIZE)
    (small_disk.parent / "new").write_bytes(data)
    assert cache.map(shard_of(data), copy(small_disk.parent / "new"))[:] == data
    assert 1 <= len(names(small_disk / "cache")) < held
    shutil.rmtree(small_disk / "cache")
    (small_disk / "more").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(InputError, match=f"expected {SIZE} bytes free for a shard in the cache .* found 0; free some"):
        cache.map(remote[0][0], copy(remote[0][1]))


def test_who_else_fetches_is_awaited_or_passed_over(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    shard, path = remote[0]
    begun, go_on = threading.Event(), threading.Event()

    def slow(local_path: str) -> None:
        begun.set()
        assert go_on.wait(DEADLINE_S)
        shutil.copyfile(path, local_path)

    cache, found = NodeCache(folder, 10 * SIZE), []
    threads = [threading.Thread(target=lambda: found.append(cache.map(shard, slow)[:]))]
    threads[0].start()
    assert begun.wait(DEADLINE_S)
    assert not cache.fetch_ahead(shard, never)
    threads.append(threading.Thread(target=lambda: found.append(cache.map(shard, never)[:])))
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert found == [path.read_bytes()] * 2
    assert names(folder) == [shard.sha256]


def _use(number: int, folder: Path, limit: int, remote: list[tuple[Shard, Path]], results: Any) -> None:
    """What each of many processes does: use shards at random, and look at every byte."""
    cache_module.FREE_SHARE = 0.0  # as in conftest.py, for this process
    cache, rng, wrong = NodeCache(folder, limit), random.Random(number), 0
    fetches = 0

    for _ in range(60):
        shard, path = rng.choice(remote)

        def fetch(local_path: str, path: Path = path) -> None:
            nonlocal fetches
            fetches += 1
            with open(local_path, "wb") as file:  # in two parts, so that others have time to come between
                data = path.read_bytes()
                file.write(data[: SIZE // 2])
                file.flush()
                time.sleep(0.002)
                file.write(data[SIZE // 2 :])

        wrong += hashlib.sha256(cache.map(shard, fetch)).hexdigest() != shard.sha256
    results.put((wrong, fetches))


@pytest.mark.parametrize("held", [1, 5, 8])
def test_four_processes_share_it(held: int, remote: list[tuple[Shard, Path]], folder: Path) -> None:
    """They read right data all the time, and never use more disk than the limit, or a shard each while fetching."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    folder.mkdir()
    limit = held * SIZE
    processes = [
        context.Process(target=_use, args=(number, folder, limit, remote, results), daemon=True) for number in range(4)
    ]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, used_bytes(folder))
        time.sleep(0.0005)
    assert [process.exitcode for process in processes] == [0] * 4
    counts = [results.get() for _ in processes]
    assert [wrong for wrong, _ in counts] == [0] * 4
    fetches = sum(count for _, count in counts)
    assert SIZE <= most <= max(held, 4) * SIZE
    assert fetches == 8 if held == 8 else fetches > 8  # each once, where all have room; else some were evicted
    assert all(len(name) == 64 for name in names(folder))  # no part is left
    assert used_bytes(folder) <= limit


HALF_A_FETCH = """
import sys, time
from pathlib import Path
from mshnet.data.store.cache import NodeCache
from mshnet.data.store.manifest import Shard

def half(local_path):
    with open(local_path, "wb") as file:
        file.write(b"half of it")
        file.flush()
        print("half", flush=True)
        time.sleep(600)

folder, name, digest, size = sys.argv[1:]
NodeCache(folder, 10 * int(size)).map(Shard(name=name, sha256=digest, rows=1, size_bytes=int(size)), half)
"""


def killed_in_a_fetch(folder: Path, shard: Shard) -> None:
    """Another process that is killed when half of the shard has arrived."""
    arguments = [str(folder), shard.name, shard.sha256, str(shard.size_bytes)]
    process = subprocess.Popen([sys.executable, "-c", HALF_A_FETCH, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)
    process.stdout.close()
    assert names(folder) == [f"{shard.sha256}.{SIZE}.part"]


def test_after_a_kill_the_next_goes_on(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    shard, path = remote[0]
    killed_in_a_fetch(folder, shard)
    assert NodeCache(folder, 10 * SIZE).map(shard, copy(path))[:] == path.read_bytes()
    assert names(folder) == [shard.sha256]


def test_what_a_killed_process_left_is_cleared_away(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    killed_in_a_fetch(folder, remote[0][0])
    shard, path = remote[1]
    NodeCache(folder, 10 * SIZE).map(shard, copy(path))
    assert names(folder) == [shard.sha256]


def test_who_waits_goes_on_when_the_one_that_fetches_is_killed(remote: list[tuple[Shard, Path]], folder: Path) -> None:
    shard, path = remote[0]
    arguments = [str(folder), shard.name, shard.sha256, str(shard.size_bytes)]
    process = subprocess.Popen([sys.executable, "-c", HALF_A_FETCH, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    found: list[bytes] = []
    cache = NodeCache(folder, 10 * SIZE)
    thread = threading.Thread(target=lambda: found.append(cache.map(shard, copy(path))[:]))
    thread.start()
    assert not cache.fetch_ahead(shard, never)
    assert found == []
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)
    process.stdout.close()
    thread.join(DEADLINE_S)
    assert found == [path.read_bytes()]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with nothing in it; the temporary folder lies beside it."""
    for name in (DIRECTORY, LIMIT, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "home"


def test_it_lies_among_the_users_caches(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = NodeCache.from_environment()
    assert (cache.folder, cache.limit_bytes) == (home / ".cache" / "mshnet", 32 * 2**30)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert NodeCache.from_environment().folder == tmp_path / "caches" / "mshnet"
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")  # the standard has relative ones ignored
    assert NodeCache.from_environment().folder == home / ".cache" / "mshnet"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_a_home_it_lies_below_the_temporary_folder(home: Path, tmp_path: Path) -> None:
    home.rmdir()
    home.write_bytes(b"")  # root may write to any folder
    cache = NodeCache.from_environment()
    assert cache.folder == tmp_path / "tmp" / f"mshnet-cache-{os.getuid()}"
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(cache.folder)
    (tmp_path / "others").mkdir()
    cache.folder.symlink_to(tmp_path / "others")  # laid there by somebody else
    with pytest.raises(InputError, match=f"to be a folder of yours, found another's; set {DIRECTORY}"):
        NodeCache.from_environment()
    assert list((tmp_path / "others").iterdir()) == []
    cache.folder.unlink()
    (tmp_path / "tmp").rmdir()
    with pytest.raises(InputError, match=f"expected a folder for the cache .*{cache.folder}.*; set {DIRECTORY} to one"):
        NodeCache.from_environment()


def test_it_lies_where_it_is_told(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0.5")
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "mine"))
    cache = NodeCache.from_environment()
    assert (cache.folder, cache.limit_bytes) == (tmp_path / "mine", 2**29)
    monkeypatch.setenv(DIRECTORY, "~/mine")
    assert NodeCache.from_environment().folder == home / "mine"
    monkeypatch.chdir(tmp_path)
    for relative in ("mine", "./mine", "~nobody-of-this-name/mine"):
        monkeypatch.setenv(DIRECTORY, relative)
        with pytest.raises(InputError, match=f"{DIRECTORY} must be an absolute path, got '{relative}'"):
            NodeCache.from_environment()


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_place_that_cannot_be_written_is_named(below: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"/proc/self/{below}"  # where not even root may make a file
    monkeypatch.setenv(DIRECTORY, place)
    with pytest.raises(
        InputError, match=f"expected {DIRECTORY} to be a folder that this user may write to, .*'{place}'"
    ):
        NodeCache.from_environment()


@pytest.mark.parametrize("given", ["0", "-1", "much", "inf", "nan", ""])
def test_a_limit_that_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, given)
    with pytest.raises(InputError, match=f"{LIMIT} must be a positive number of GiB, got '{given}'"):
        NodeCache.from_environment()
