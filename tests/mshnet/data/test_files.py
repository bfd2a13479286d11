"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mshnet.data.files import create_atomically, put_file, remove_orphans, write_atomically


def test_a_file_is_written_below_new_folders_and_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.bin"
    write_atomically(str(target), b"first")
    write_atomically(str(target), memoryview(b"second, longer"))
    assert target.read_bytes() == b"second, longer"
    assert [path.name for path in target.parent.iterdir()] == ["b.bin"]


def test_others_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomically(str(tmp_path / "report.html"), b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "kept.bin"
    write_atomically(str(target), b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.bin"]


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_created_once_and_left_as_it_is(kind: str, tmp_path: Path) -> None:
    uri = f"{tmp_path}/a/manifest.json" if kind == "local" else f"memory://{tmp_path.name}-{id(tmp_path)}/manifest.json"
    create_atomically(uri, b"first")
    with pytest.raises(FileExistsError):
        create_atomically(uri, b"second")
    fs, path = fsspec.core.url_to_fs(uri)
    assert fs.cat_file(path) == b"first"
    assert [name.rsplit("/", 1)[-1] for name in fs.ls(path.rpartition("/")[0], detail=False)] == ["manifest.json"]


def test_one_of_many_creates_it(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def rival(number: int) -> bool:
        together.wait()
        try:
            create_atomically(str(tmp_path / "manifest.json"), bytes([number]) * 100_000)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(rival, range(8)))
    assert won.count(True) == 1
    assert (tmp_path / "manifest.json").read_bytes() == bytes([won.index(True)]) * 100_000
    assert os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_one_of_many_creates_it_without_hard_links_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    test_one_of_many_creates_it(tmp_path)


def test_without_hard_links_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        monkeypatch.setattr(os, "fsync", full)
        raise OSError(errno.EPERM, "Operation not permitted")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="No space left"):
        create_atomically(str(tmp_path / "manifest.json"), b"data")
    assert os.listdir(tmp_path) == []


def test_another_reason_not_to_link_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        create_atomically(str(tmp_path / "manifest.json"), b"data")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["local", "file", "memory"])
def test_a_file_is_put_as_it_is_and_kept(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source with ü.bin"
    source.write_bytes(os.urandom(3_000_001))
    uri = {"local": f"{tmp_path}/b/c.bin", "file": f"file://{tmp_path}/b/c.bin", "memory": "memory://put/b/c.bin"}[kind]
    for _ in range(2):
        put_file(source, uri)
    fs, path = fsspec.core.url_to_fs(uri)
    assert fs.cat_file(path) == source.read_bytes()
    assert len(fs.ls(path.rpartition("/")[0])) == 1


def test_a_file_that_cannot_be_put_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        put_file(tmp_path / "nowhere", str(tmp_path / "b" / "c.bin"))
    assert os.listdir(tmp_path / "b") == []


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    """The writer's process stops with its file half written, and then it is killed."""
    code = (
        "import os, sys\n"
        "from mshnet.data import files\n"
        "os.fsync = lambda _: (print('half', flush=True), sys.stdin.read())\n"
        "files.write_atomically(sys.argv[1], b'x' * 1000)\n"
    )
    target = tmp_path / "deep" / "shard.arrow"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        (temporary,) = target.parent.iterdir()
        (target.parent / "kept.arrow").write_bytes(b"")
        assert remove_orphans(str(tmp_path)) == []
        assert temporary.exists()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert remove_orphans(f"file://{tmp_path}") == [str(temporary)]
    assert os.listdir(target.parent) == ["kept.arrow"]
    assert remove_orphans(str(tmp_path)) == remove_orphans(str(tmp_path / "nowhere")) == []
    assert remove_orphans("memory://anything") == []


def test_an_orphan_hunter_never_takes_a_file_from_its_writer(tmp_path: Path) -> None:
    stop = threading.Event()

    def hunt() -> None:
        while not stop.is_set():
            remove_orphans(str(tmp_path))

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        for i in range(300):
            write_atomically(str(tmp_path / f"{i}"), b"x")
    finally:
        stop.set()
        hunter.join()
    assert len(os.listdir(tmp_path)) == 300


def test_other_file_systems_take_it_whole() -> None:
    write_atomically("memory://somewhere/x.bin", b"data")
    assert fsspec.filesystem("memory").cat_file("/somewhere/x.bin") == b"data"
