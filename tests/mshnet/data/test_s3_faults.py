"""A real server behind a proxy that fails, killed and started again: only the delay is noticed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mshnet.data.files import create_atomically, put_file, write_atomically
from mshnet.data.filesystem import filesystem
from tests.fault_proxy import FaultProxy, Faults
from tests.object_store import ObjectStore

MANY = Faults(slow_down=0.03, reset=0.02, lose_answer=0.02, truncate=0.03, delay=0.05, delay_s=0.2)  # each tenth fails
SLOW = Faults(delay=1.0, delay_s=0.3)


@pytest.fixture
def proxy(object_store: ObjectStore, s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between us and the server; lets everything pass at first."""
    with FaultProxy(object_store.endpoint, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 MB: ten parts."""
    path = tmp_path_factory.mktemp("big") / "shard.arrow"
    path.write_bytes(os.urandom(80_000_000))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_background(work: Callable[[], object]) -> Future[object]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited a minute in vain"
        time.sleep(0.01)


def test_a_thousand_small_files_from_many_threads(proxy: FaultProxy, s3_folder: str) -> None:
    proxy.faults = MANY

    def one(number: int) -> None:
        uri, data = f"{s3_folder}/{number % 7}/ü {number}", os.urandom(1 + number * 37)
        write_atomically(uri, data)
        fs, path = filesystem(uri)
        assert fs.cat_file(path) == data
        assert fs.size(path) == len(data)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(500)))
    fs, root = filesystem(s3_folder)
    found = fs.find(root, detail=True)
    assert sorted(info["size"] for info in found.values()) == [1 + number * 37 for number in range(500)]
    fs.rm(root, recursive=True)
    assert not fs.exists(root)
    assert min(proxy.counts[fault] for fault in ("slow_down", "reset", "lose_answer", "truncate", "delay")) > 5


def test_big_files_through_faults(proxy: FaultProxy, s3_folder: str, big: Path, tmp_path: Path) -> None:
    proxy.faults = Faults(slow_down=0.1, reset=0.1, lose_answer=0.1, truncate=0.1)
    for _ in range(2):
        put_file(big, f"{s3_folder}/shard.arrow")
        fs, path = filesystem(f"{s3_folder}/shard.arrow")
        fs.get_file(path, str(tmp_path / "back"))
        assert sha256(tmp_path / "back") == sha256(big)
        with fs.open(path, "rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == sha256(big)
    assert fs.info(path)["ETag"].endswith('-10"')  # parts
    assert sum(proxy.counts.values()) - proxy.counts["requests"] > 5


def test_a_big_file_goes_and_comes_in_little_memory(s3_folder: str, tmp_path: Path) -> None:
    size = 200_000_000
    with open(tmp_path / "big", "wb") as file:
        file.truncate(size)
    fs, path = filesystem(f"{s3_folder}/big")
    for move in (lambda: put_file(tmp_path / "big", f"{s3_folder}/big"), lambda: fs.get_file(path, f"{tmp_path}/back")):
        tracemalloc.start()
        try:
            move()
            assert tracemalloc.get_traced_memory()[1] < 100_000_000
        finally:
            tracemalloc.stop()
    assert os.path.getsize(tmp_path / "back") == fs.size(path) == size


@pytest.mark.parametrize("way", ["up", "down", "read"])
def test_a_server_killed_in_the_middle(
    way: str, proxy: FaultProxy, object_store: ObjectStore, s3_folder: str, big: Path, tmp_path: Path
) -> None:
    uri = f"{s3_folder}/shard.arrow"
    fs, path = filesystem(uri)
    if way != "up":
        put_file(big, uri)
    work = {
        "up": lambda: put_file(big, uri),
        "down": lambda: fs.get_file(path, str(tmp_path / "back")),
        "read": lambda: (tmp_path / "back").write_bytes(fs.open(path, "rb").read()),
    }[way]
    proxy.faults = SLOW
    before = proxy.counts["requests"]
    future = in_background(work)
    try:
        until(lambda: proxy.counts["requests"] >= before + 2)
        object_store.kill("client.rgw")
        assert not future.done()
        failed = proxy.counts["requests"]
        until(lambda: proxy.counts["requests"] >= failed + 8)  # asked again and again
        assert not future.done()
    finally:
        object_store.start()
    future.result(timeout=120)
    if way == "up":
        fs.get_file(path, str(tmp_path / "back"))
    assert sha256(tmp_path / "back") == sha256(big)


def test_a_whole_server_killed_between_writes(object_store: ObjectStore, s3_folder: str) -> None:
    """Monitor and disk too: what was written before is there, what is written meanwhile arrives."""
    for number in range(20):
        write_atomically(f"{s3_folder}/{number}", b"%d" % number)
    object_store.kill()
    future = in_background(lambda: write_atomically(f"{s3_folder}/20", b"20"))
    object_store.start()
    future.result(timeout=120)
    fs, root = filesystem(s3_folder)
    assert [fs.cat_file(f"{root}/{number}") for number in range(21)] == [b"%d" % number for number in range(21)]


def test_a_lost_answer_looks_like_a_rival_with_the_same_contents(proxy: FaultProxy, s3_folder: str) -> None:
    fs, path = filesystem(f"{s3_folder}/manifest.json")
    proxy.faults = Faults(lose_answer=1.0)
    future = in_background(lambda: create_atomically(f"{s3_folder}/manifest.json", b"mine"))
    until(lambda: proxy.counts["lose_answer"] > 0)
    proxy.faults = Faults()
    with pytest.raises(FileExistsError):
        future.result(timeout=60)
    assert fs.cat_file(path) == b"mine"


def test_one_of_many_creates_it(s3_folder: str) -> None:
    together = threading.Barrier(16)

    def rival(number: int) -> bool:
        together.wait()
        try:
            create_atomically(f"{s3_folder}/manifest.json", b"%d" % number)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(rival, range(16)))
    assert won.count(True) == 1
    fs, path = filesystem(f"{s3_folder}/manifest.json")
    assert fs.cat_file(path) == b"%d" % won.index(True)


def test_what_others_write_is_seen_at_once(s3_folder: str) -> None:
    from mshnet.data.s3 import ObjectStore as Client

    mine, root = filesystem(s3_folder)
    assert not mine.exists(f"{root}/new")
    assert mine.find(root) == []
    Client(skip_instance_cache=True).pipe_file(f"{root}/new", b"data")
    assert mine.ls(root, detail=False) == mine.find(root) == [f"{root}/new"]
    assert mine.size(f"{root}/new") == 4


def test_a_forked_process_has_its_own_connection(s3_folder: str) -> None:
    write_atomically(f"{s3_folder}/file", b"data")
    child = os.fork()
    if child == 0:
        fs, path = filesystem(f"{s3_folder}/file")
        os._exit(0 if fs.cat_file(path) == b"data" else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.01)
    assert done == (child, 0)
    fs, path = filesystem(f"{s3_folder}/file")
    assert fs.cat_file(path) == b"data"


def test_pieces_of_a_file(s3_folder: str) -> None:
    write_atomically(f"{s3_folder}/file", b"0123456789")
    fs, path = filesystem(f"{s3_folder}/file")
    assert fs.cat_file(path, start=2, end=5) == b"234"
    assert fs.cat_file(path, start=-3) == b"789"
    assert fs.cat_file(path, end=-8) == b"01"
    assert fs.cat_ranges([path, path], [0, 4], [1, 6]) == [b"0", b"45"]
    assert fs.cat([path]) == {path: b"0123456789"}
