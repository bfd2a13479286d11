"""Where the pipelines' durable things lie. Local paths and fsspec URIs are the same to it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import re
import uuid
from collections.abc import Mapping
from typing import Any

from mshnet.data.files import create_atomically, write_atomically
from mshnet.data.files import remove_orphans as remove_orphans
from mshnet.data.filesystem import filesystem, is_local, is_s3, refuse_secrets
from mshnet.errors import InputError


def silence() -> None:
    """In this process: S3's libraries tell again and again where they found the credentials, and what they fetch."""
    for library in ("aiobotocore", "botocore", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)


def absolute(uri: str) -> str:
    """A local path made absolute, because workers have another working directory; a URI with single slashes.

    Raises InputError for an empty one, and for a remote one that carries credentials.
    """
    if not uri:
        raise InputError(
            "expected a folder or URI, found an empty one; name one, such as outputs/store or s3://BUCKET/x"
        )
    if "://" not in uri:
        return os.path.abspath(os.path.expanduser(uri))
    if not is_local(uri):
        refuse_secrets(uri)
    scheme, _, place = uri.partition("://")
    place = re.sub(r"(?<![:/])/{2,}", "/", place)  # not the slashes of a second scheme, after ::
    return f"{scheme}://{place.rstrip('/') or place[:1]}"


def join(uri: str, *names: str) -> str:
    """A place below a place. InputError for a name that would lead out of it: names come from files, too."""
    for name in names:
        if name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise InputError(f"expected the name of something below {uri!r}, found {name!r}; mend what names it")
    return posixpath.join(uri, *names)


def below(root: str, uri: str) -> str:
    """The part of a URI below a place: what is recorded, so that a store can be moved."""
    prefix = root.rstrip("/") + "/"
    if not uri.startswith(prefix):
        raise ValueError(f"{uri!r} is not below {root!r}")
    return uri.removeprefix(prefix)


def exists(uri: str) -> bool:
    """Whether there is a file or folder."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def size_bytes(uri: str) -> int | None:
    """Of a file; None where there is none."""
    fs, path = filesystem(uri)
    try:
        found = fs.info(path)
    except FileNotFoundError:
        return None
    return int(found["size"]) if found["type"] == "file" else None


def sizes(uri: str) -> dict[str, int]:
    """Bytes of each file that lies in a folder, by name; one listing. Empty where there is no such folder."""
    fs, path = filesystem(uri)
    try:
        found = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {posixpath.basename(entry["name"]): int(entry["size"]) for entry in found if entry["type"] == "file"}


def folders_with(uri: str, name: str) -> list[str]:
    """The folders in a folder that hold a file of that name, sorted. Empty where there is no such folder."""
    fs, path = filesystem(uri)
    try:
        found = fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    folders = (join(uri, posixpath.basename(e["name"].rstrip("/"))) for e in found if e["type"] == "directory")
    return sorted(folder for folder in folders if size_bytes(join(folder, name)) is not None)


def sha256(uri: str) -> str | None:
    """Of a file's bytes, hexadecimal; None where there is none."""
    fs, path = filesystem(uri)
    try:
        with fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def read_bytes(uri: str) -> bytes:
    """A whole file."""
    fs, path = filesystem(uri)
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
    write_bytes(uri, _json(data))


def create_json(uri: str, data: Mapping[str, Any]) -> bool:
    """The same where there is none yet, by one of all that try at once; False for the others.

    False also where its own first try arrived but not the answer: compare the contents.
    """
    try:
        create_atomically(uri, _json(data))
    except FileExistsError:
        return False
    return True


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=2, allow_nan=False).encode()


def remove(uri: str) -> None:
    """A folder with all that is in it; nothing where there is none."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def check_writable(uri: str) -> None:
    """Write a few bytes below a place and delete them, before anything expensive; a local folder is made.

    Raises InputError within seconds where that cannot be, and for a name that would be taken for a pattern.
    """
    if not is_local(uri) and not is_s3(uri) and re.search(r"[*?[]", uri):  # fsspec would delete all that matches
        raise InputError(f"expected a URI without any of * ? [, found {uri!r}; choose another name")
    fs, path = filesystem(join(uri, f".writable-{uuid.uuid4().hex}"), quick=True)
    try:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.pipe_file(path, b"x")
        fs.rm_file(path)
    except (OSError, ValueError) as error:
        found, advice = _trouble(uri, error, "write to")
        raise InputError(f"expected a place to write to at {uri!r}, found {found}; {advice}") from error


def check_readable(uri: str) -> None:
    """Look whether the server of a URI answers and lets this user look there, before anything expensive.

    Raises InputError within seconds where not. Whether there is anything is another question.
    """
    fs, path = filesystem(uri, quick=True)
    try:
        fs.isdir(path)
    except (OSError, ValueError) as error:
        found, advice = _trouble(uri, error, "read")
        raise InputError(f"expected a place to read from at {uri!r}, found {found}; {advice}") from error


def _trouble(uri: str, error: Exception, verb: str) -> tuple[str, str]:
    """What was found, in words, and what to do."""
    if not is_s3(uri):
        return f"{type(error).__name__}: {error}", f"give a folder that this user may {verb}"
    if isinstance(error, FileNotFoundError):
        return "no such bucket", "correct its name, or make it; AWS_ENDPOINT_URL says at which server"
    if "QuotaExceeded" in str(error):  # a 403 like a wrong key
        return f"no room left there ({error})", "delete something, or raise the bucket's or the account's quota"
    if isinstance(error, PermissionError):
        return (
            f"no credentials that may {verb} it ({error})",
            "set AWS_PROFILE (its files: AWS_CONFIG_FILE, AWS_SHARED_CREDENTIALS_FILE), or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY",
        )
    if isinstance(error, ConnectionError):
        return str(error), "start the server, or correct AWS_ENDPOINT_URL (or the profile's endpoint_url)"
    return f"{type(error).__name__}: {error}", "mend it (AWS_CONFIG_FILE, AWS_ENDPOINT_URL, AWS_REGION) and start again"


def for_arrow(uri: str) -> tuple[str, Any]:
    """Path and pyarrow file system of a URI, as Ray Train wants its storage."""
    import pyarrow.fs

    fs, path = filesystem(uri)
    if is_local(uri):
        return path, pyarrow.fs.LocalFileSystem()
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
