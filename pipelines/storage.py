"""Where the pipelines' durable things lie. Local paths and fsspec URIs are the same to it."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping
from typing import Any

import fsspec

from mshnet.data.files import write_atomically
from mshnet.errors import InputError


def absolute(uri: str) -> str:
    """A local path made absolute, because workers have another working directory; other URIs as they are."""
    return uri if "://" in uri or not uri else os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *names: str) -> str:
    """A place below a place."""
    return posixpath.join(uri, *names)


def below(root: str, uri: str) -> str:
    """The part of a URI below a place: what is recorded, so that a store can be moved."""
    prefix = root.rstrip("/") + "/"
    if not uri.startswith(prefix):
        raise ValueError(f"{uri!r} is not below {root!r}")
    return uri.removeprefix(prefix)


def exists(uri: str) -> bool:
    """Whether there is a file or folder."""
    fs, path = fsspec.core.url_to_fs(uri)
    return bool(fs.exists(path))


def size_bytes(uri: str) -> int | None:
    """Of a file; None where there is none."""
    fs, path = fsspec.core.url_to_fs(uri)
    return int(fs.size(path)) if fs.exists(path) else None


def read_bytes(uri: str) -> bytes:
    """A whole file."""
    fs, path = fsspec.core.url_to_fs(uri)
    data: bytes = fs.cat_file(path)
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """A whole file, never readable half-written."""
    write_atomically(uri, data)


def read_json(uri: str) -> dict[str, Any] | None:
    """A JSON object; None where there is none. Raises InputError for a damaged one: no crash of ours leaves it."""
    try:
        data = json.loads(read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"expected JSON in {uri!r}: {error}; delete the file to make it again") from error
    if not isinstance(data, dict):
        raise InputError(f"expected a JSON object in {uri!r}, found {type(data).__name__}; delete it to make it again")
    return data


def write_json(uri: str, data: Mapping[str, Any]) -> None:
    """Indented JSON, never readable half-written."""
    write_bytes(uri, json.dumps(data, indent=2, allow_nan=False).encode())


def remove(uri: str) -> None:
    """A folder with all that is in it; nothing where there is none."""
    fs, path = fsspec.core.url_to_fs(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def for_arrow(uri: str) -> tuple[str, Any]:
    """Path and pyarrow file system of a URI, as Ray Train wants its storage."""
    import pyarrow.fs

    fs, path = fsspec.core.url_to_fs(uri)
    local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    if local:
        return path, pyarrow.fs.LocalFileSystem()
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
