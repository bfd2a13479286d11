"""Whole files, put in place at once. Loads no torch, so that commands stay quick."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mshnet.data.filesystem import filesystem, is_local

_WRITING = ".writing-"


def write_atomically(uri: str, data: bytes | memoryview) -> None:
    """Put a whole file in place of what is there: never readable half-written. Object stores do so by themselves."""
    fs, path = filesystem(uri)
    if is_local(uri):
        with _temporary(path) as file:
            file.write(data)
            _to_disk(file)
            os.replace(file.name, path)
    else:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.pipe_file(path, bytes(data))


def create_atomically(uri: str, data: bytes | memoryview) -> None:
    """Put a whole file where there is none, one of all that try at once.

    Raises FileExistsError for the others. On an object store also for one whose own first try arrived while its
    answer was lost, so compare the contents before taking it for a rival's.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        with _temporary(path) as file:
            file.write(data)
            _to_disk(file)
            try:
                os.link(file.name, path)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise
                _create_in_place(path, data)
    else:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.pipe_file(path, bytes(data), mode="create")


def _create_in_place(path: str, data: bytes | memoryview) -> None:
    # For file systems without hard links (FAT, some of FUSE). One of all still wins, but others may see its file
    # before it is whole, and SIGKILL or a power cut in between leaves it so.
    with open(path, "xb") as file:
        try:
            file.write(data)
            _to_disk(file)
        except BaseException:
            os.unlink(path)
            raise


def put_file(local_path: str | os.PathLike[str], uri: str) -> None:
    """Put a copy of a big local file in place of what is there, whole, in memory that does not grow with it."""
    fs, path = filesystem(uri)
    if is_local(uri):
        with _temporary(path) as file, open(local_path, "rb") as source:
            shutil.copyfileobj(source, file, 2**20)
            _to_disk(file)
            os.replace(file.name, path)
    else:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.put_file(os.fspath(local_path), path)


def remove_orphans(uri: str) -> list[str]:
    """Delete, below a local folder, the temporary files of writers that were killed; returns their paths.

    One that somebody writes at the moment stays. On object stores, where an upload shows only when it is whole,
    there is nothing to do.
    """
    if not is_local(uri):
        return []
    removed = []
    for orphan in Path(filesystem(uri)[1]).rglob(f"{_WRITING}*"):
        with contextlib.suppress(OSError), open(orphan, "r+b") as file:  # somebody's, or just gone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            orphan.unlink()
            removed.append(str(orphan))
    return sorted(removed)


@contextlib.contextmanager
def _temporary(path: str) -> Iterator[BinaryIO]:
    """A new file beside `path`, locked while it is written to; gone afterwards unless it was renamed."""
    folder = posixpath.dirname(path)
    os.makedirs(folder, exist_ok=True)
    file = _locked(folder)
    try:
        yield file
    finally:
        with file, contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)


def _locked(folder: str) -> BinaryIO:
    while True:
        # Not tempfile, whose files nobody else in a team can read.
        file = open(posixpath.join(folder, _WRITING + uuid.uuid4().hex), "xb")  # noqa: SIM115 the caller closes it
        with contextlib.suppress(OSError):  # a file system without locks keeps its orphans
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # remove_orphans came between


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
