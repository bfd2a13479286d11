"""Whole files, put in place at once. Loads no torch, so that commands stay quick."""

from __future__ import annotations

import os
import posixpath
import tempfile

import fsspec


def write_atomically(uri: str, data: bytes | memoryview) -> None:
    """Put a whole file in place: never readable half-written. Object stores do so by themselves."""
    fs, path = fsspec.core.url_to_fs(uri)
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    if not local:
        fs.pipe_file(path, bytes(data))
        return
    handle, temporary = tempfile.mkstemp(dir=posixpath.dirname(path), prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
