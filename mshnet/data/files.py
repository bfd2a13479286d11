"""Whole files, put in place at once. Loads no torch, so that commands stay quick."""

from __future__ import annotations

import contextlib
import os
import posixpath
import uuid

import fsspec


def write_atomically(uri: str, data: bytes | memoryview) -> None:
    """Put a whole file in place: never readable half-written. Object stores do so by themselves."""
    fs, path = fsspec.core.url_to_fs(uri)
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    if not local:
        fs.pipe_file(path, bytes(data))
        return
    temporary = posixpath.join(posixpath.dirname(path), f".writing-{uuid.uuid4().hex}")
    try:
        # Not tempfile, whose files nobody else in a team can read.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
