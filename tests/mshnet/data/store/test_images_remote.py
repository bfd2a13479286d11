"""Stores that are not on this machine: fetched into the node's cache, mended from there or refused, never wrong."""

from __future__ import annotations

import gc
import os
import pickle
import posixpath
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor

from mshnet.data.batches import EpisodeLoader
from mshnet.data.episodes import Episode
from mshnet.data.filesystem import filesystem
from mshnet.data.source import LabelledImage
from mshnet.data.store.cache import DIRECTORY, LIMIT
from mshnet.data.store.images import ImageStore
from mshnet.errors import InputError
from tests.fault_proxy import FaultProxy, Faults
from tests.mshnet.data.stored import noise_image, write_store
from tests.object_store import ObjectStore

URI = "memory://remote-store/images"
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def images() -> Mapping[str, LabelledImage]:
    return {f"{i:02}": noise_image(i) for i in range(12)}


@pytest.fixture(scope="module")
def local(images: Mapping[str, LabelledImage], tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """Four shards of three images."""
    return write_store(str(tmp_path_factory.mktemp("local")), images)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the node."""
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "cache"))
    return tmp_path / "cache"


def upload(local: ImageStore, uri: str) -> ImageStore:
    fs, root = filesystem(uri)
    for path in Path(local.uri).iterdir():
        fs.pipe_file(posixpath.join(root, path.name), path.read_bytes())
    return ImageStore(uri)


@pytest.fixture
def remote(local: ImageStore, cache: Path) -> Iterator[ImageStore]:
    """The same store in memory, opened; each test's own."""
    yield upload(local, URI)
    filesystem(URI)[0].rm("/remote-store", recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that were fetched, in order."""
    names: list[str] = []
    get_file = MemoryFileSystem.get_file

    def spy(self: Any, path: str, *rest: Any, **options: Any) -> None:
        names.append(posixpath.basename(path))
        get_file(self, path, *rest, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", spy)
    return names


def parts(store: ImageStore, row: int) -> list[Tensor]:
    return [store.image(row), store.mask(row, 0, with_ignore=True), store.mask(row, 2)]


def assert_same(store: ImageStore, local: ImageStore, rows: range) -> None:
    for row in rows:
        assert all(map(torch.equal, parts(store, row), parts(local, row)))


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"lock"}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def at_a_picture(data: bytes, number: int = 0) -> int:
    """Somewhere within the pixels of a shard's image."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"\x89PNG\r\n", at + 1)
    return at + 300


def test_shards_come_when_they_are_needed_and_once(remote: ImageStore, local: ImageStore, fetched: list[str]) -> None:
    names = [shard.name for shard in remote.manifest.shards]
    assert [remote.shard_of(row) for row in range(12)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert remote.contents() == local.contents()
    assert (remote.image_id(4), remote.row("11"), remote.image_ids) == ("04", 11, local.image_ids)
    assert fetched == []  # lists need no pixels
    assert_same(remote, local, range(7, 8))
    assert fetched == [names[2]]
    assert_same(remote, local, range(12))
    assert sorted(fetched) == sorted(names)
    assert_same(ImageStore(URI), local, range(12))
    assert len(fetched) == 4


def test_rows_out_of_range_are_refused(remote: ImageStore) -> None:
    for row in (-1, 12):
        with pytest.raises(IndexError, match=rf"row must be 0..11, got {row}"):
            remote.image(row)


def test_a_limit_of_one_shard_is_slow_but_right(
    remote: ImageStore, local: ImageStore, cache: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = max(shard.size_bytes for shard in remote.manifest.shards)
    monkeypatch.setenv(LIMIT, str((size + 1) / 2**30))
    store = ImageStore(URI)
    for _ in range(2):
        assert_same(store, local, range(12))
        assert len(cached(cache)) == 1
    assert len(fetched) == 8
    held = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache) in line]
    assert held == []  # what was evicted takes no disk space either


def damage(store: ImageStore, number: int, change: Callable[[bytes], bytes]) -> str:
    """Change a remote shard; gives its name."""
    fs, root = filesystem(store.uri)
    path = posixpath.join(root, store.manifest.shards[number].name)
    fs.pipe_file(path, change(fs.cat_file(path)))
    return store.manifest.shards[number].name


def test_a_damaged_remote_shard_is_named_after_a_second_look(
    remote: ImageStore, local: ImageStore, fetched: list[str], cache: Path
) -> None:
    name = damage(remote, 1, lambda data: flip(data, at_a_picture(data)))
    message = rf"expected sha256 .*…, found .*… in shard {name} of the store '{URI}'; mend it .*--repair"
    with pytest.raises(InputError, match=message):
        remote.image(3)
    assert fetched == [name, name]
    assert cached(cache) == set()
    assert_same(remote, local, range(3))  # the others are as good as before
    with pytest.raises(InputError, match=message):
        remote.mask(5, 0)


def test_a_truncated_remote_shard_is_named(remote: ImageStore) -> None:
    name, size = remote.manifest.shards[1].name, remote.manifest.shards[1].size_bytes
    damage(remote, 1, lambda data: data[:-9])
    with pytest.raises(InputError, match=f"expected {size} bytes, found {size - 9} in shard {name} of the store"):
        remote.image(3)
    with pytest.raises(InputError, match=f"expected {size} bytes, found {size - 9} in shard {name} of the store"):
        ImageStore(URI)


def test_a_missing_remote_shard_is_named(remote: ImageStore, fetched: list[str]) -> None:
    name = remote.manifest.shards[1].name
    fs, root = filesystem(URI)
    fs.rm_file(posixpath.join(root, name))
    for read in (lambda: remote.image(3), lambda: remote.contents(), lambda: ImageStore(URI)):
        with pytest.raises(InputError, match=rf"expected \d+ bytes, found none in shard {name} of the store"):
            read()
    assert fetched == [name, name]


def test_a_shard_that_arrives_damaged_once_is_fetched_again(
    remote: ImageStore, local: ImageStore, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spied = MemoryFileSystem.get_file

    def broken_once(self: Any, path: str, local_path: str, *rest: Any, **options: Any) -> None:
        spied(self, path, local_path, *rest, **options)
        if len(fetched) == 1:
            Path(local_path).write_bytes(flip(Path(local_path).read_bytes(), 5000))

    monkeypatch.setattr(MemoryFileSystem, "get_file", broken_once)
    assert_same(remote, local, range(3))
    assert len(fetched) == 2


@pytest.mark.parametrize("how", ["pixels", "structure", "truncated"])
def test_a_damaged_copy_is_mended(
    how: str, remote: ImageStore, local: ImageStore, fetched: list[str], cache: Path
) -> None:
    remote.image(3)
    copy = cache / remote.manifest.shards[1].sha256
    data = copy.read_bytes()
    at = at_a_picture(data) if how == "pixels" else len(data) - 1
    copy.write_bytes(data[:-1000] if how == "truncated" else flip(data, at))
    if how == "structure":
        remote = ImageStore(URI)  # which is read when a shard is opened
    assert_same(remote, local, range(3, 6))
    assert fetched == [remote.manifest.shards[1].name] * 2
    assert copy.read_bytes() == data


def test_damaged_labels_are_refused(remote: ImageStore, local: ImageStore, fetched: list[str]) -> None:
    """Lists are read apart from the pixels, so they have a checksum of their own."""
    remote.image(8)
    name = damage(remote, 2, lambda data: data.replace(b"060708", b"060908"))  # the ids, one after the other
    for read in (remote.contents, lambda: remote.image_id(7)):
        with pytest.raises(InputError, match=rf"expected crc32 .* in row 1, found .* in shard {name} of the store"):
            read()
    assert_same(remote, local, range(6, 9))  # a good copy of the pixels is not thrown away for it
    assert len(fetched) == 1


def test_reading_ahead_fetches_in_order_of_use(remote: ImageStore, local: ImageStore, fetched: list[str]) -> None:
    names = [shard.name for shard in remote.manifest.shards]
    remote.read_ahead(iter([10, 0, 11, 4, 1]))
    wait_until(lambda: len(fetched) == 3)
    assert fetched == [names[3], names[0], names[1]]
    wait_until(lambda: not any(thread.name == "read-ahead" for thread in threading.enumerate()))
    assert_same(remote, local, range(6))
    assert len(fetched) == 3
    local.read_ahead(iter([0]))  # nothing to do


def test_reading_ahead_of_a_damaged_shard_harms_nobody(remote: ImageStore, local: ImageStore) -> None:
    damage(remote, 3, lambda data: flip(data, at_a_picture(data)))
    remote.read_ahead(range(11, -1, -1))
    wait_until(lambda: not any(thread.name == "read-ahead" for thread in threading.enumerate()))
    assert_same(remote, local, range(9))
    with pytest.raises(InputError, match="expected sha256"):
        remote.image(9)


def test_reading_ahead_ends_with_the_store(
    remote: ImageStore, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, spied = threading.Event(), threading.Event(), MemoryFileSystem.get_file

    def slow(self: Any, *arguments: Any, **options: Any) -> None:
        begun.set()
        assert go_on.wait(DEADLINE_S)
        spied(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow)
    store = ImageStore(URI)
    store.read_ahead(range(12))
    assert begun.wait(DEADLINE_S)
    del store
    gc.collect()
    go_on.set()
    wait_until(lambda: not any(thread.name == "read-ahead" for thread in threading.enumerate()))
    assert len(fetched) == 1


def test_many_threads_read_one_store(remote: ImageStore, local: ImageStore, fetched: list[str]) -> None:
    expected = [parts(local, row) for row in range(12)]
    wrong: list[int] = []

    def read(begin: int) -> None:
        for i in range(36):
            row = (begin + i) % 12
            if not all(map(torch.equal, parts(remote, row), expected[row])):
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(begin,)) for begin in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert wrong == []
    assert len(fetched) == 4


def test_loader_processes_share_the_cache_of_a_small_disk(
    local: ImageStore, cache: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them, on a real S3 server, with room for two of four shards."""
    limit = 2 * max(shard.size_bytes for shard in local.manifest.shards) + 1
    monkeypatch.setenv(LIMIT, str(limit / 2**30))
    episodes = [Episode(row, ((row + 5) % 12,), 2 * (row % 2)) for row in range(12)] * 2
    positions = [[i, i + 1] for i in range(0, len(episodes), 2)]
    remote = upload(local, f"{s3_folder}/images")
    expected = list(EpisodeLoader(local).batches(episodes, positions))
    with EpisodeLoader(remote, processes=2) as loader:
        for i, batch in enumerate(loader.batches(episodes, positions)):
            for name in ("query_images", "query_masks", "support_images", "support_masks"):
                assert torch.equal(getattr(batch, name), getattr(expected[i], name))
    assert cached(cache) <= {shard.sha256 for shard in local.manifest.shards}
    assert sum(path.stat().st_size for path in cache.iterdir()) <= limit


def test_opening_takes_two_requests_and_loads_nothing(
    images: Mapping[str, LabelledImage],
    cache: Path,
    object_store: ObjectStore,
    s3_folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The manifest, and one listing, however many shards there are."""
    write_store(f"{s3_folder}/images", images, images_per_shard=1)
    with FaultProxy(object_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = ImageStore(f"{s3_folder}/images")
        assert (len(store.manifest.shards), proxy.counts["requests"]) == (12, 2)
        assert len(pickle.loads(pickle.dumps(store))) == 12
        assert proxy.counts["requests"] == 2
    assert cached(cache) == set()


def test_one_request_in_five_fails(
    local: ImageStore, cache: Path, object_store: ObjectStore, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(local, f"{s3_folder}/images")
    faults = Faults(slow_down=0.08, reset=0.04, truncate=0.08)
    with FaultProxy(object_store.endpoint, faults, seed=2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for _ in range(8):
            store = ImageStore(f"{s3_folder}/images")
            assert store.contents() == local.contents()
            assert_same(store, local, range(12))
            shutil.rmtree(cache)
    assert sum(proxy.counts[name] for name in ("slow_down", "reset", "truncate")) >= 10


def test_the_server_is_killed_and_started_again(
    local: ImageStore, cache: Path, object_store: ObjectStore, s3_folder: str
) -> None:
    store = upload(local, f"{s3_folder}/images")
    assert_same(store, local, range(3))
    object_store.kill()
    assert_same(store, local, range(3))  # what is here needs no server
    again = threading.Thread(target=object_store.start)
    again.start()
    try:
        assert_same(store, local, range(12))
    finally:
        again.join(DEADLINE_S)
    assert os.listdir(cache)
