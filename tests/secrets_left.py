"""Secrets that a run left behind: in files, also compressed or encoded ones, and in processes' command lines."""

from __future__ import annotations

import base64
import bz2
import contextlib
import gzip
import io
import json
import lzma
import mmap
import sqlite3
import stat
import threading
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SHORTEST = 8
"""A shorter value is found by chance."""
DEEPEST = 3
"""Archives in archives in archives."""
LOOK_S = 0.1
"""Between two looks at the processes."""


def assert_no_secret(secrets: Mapping[str, str], folders: Sequence[Path], but: Sequence[Path] = ()) -> int:
    """That no file below the folders (`but` these, or what is below them) holds a secret; how many were looked at.

    The secrets are by name; only names are ever printed. They are found as they are, as JSON and URLs escape them, in
    base64 (alone, or behind any user as HTTP sends passwords), in names of files, and inside gzip, bzip2, xz, zip and
    SQLite.
    """
    __tracebackhide__ = True  # pytest prints arguments
    needles = _all_needles(secrets)
    looked_at, found = 0, []
    for folder in folders:
        files = list(_files(folder, but))
        if not files:
            raise ValueError(f"expected files to look at in {folder}, found none")
        for file in files:
            looked_at += 1
            found += [f"{file}: {name} ({how})" for name, how in _in_file(file, needles)]
    if found:
        raise AssertionError("expected no secret in any file, found\n" + "\n".join(found))
    return looked_at


@contextmanager
def no_secret_in_command_lines(secrets: Mapping[str, str]) -> Iterator[None]:
    """That no process of this machine has a secret in its command line while the block runs."""
    __tracebackhide__ = True
    needles, found, end = _all_needles(secrets), set[str](), threading.Event()
    seen: set[bytes] = set()

    def look() -> None:
        while True:
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # just gone
                    line = file.read_bytes()
                    if line in seen:
                        continue
                    seen.add(line)
                    program = line.partition(b"\0")[0].decode(errors="replace")
                    found.update(f"process {file.parent.name} {program}: {name}" for name, _ in _in(line, needles))
            if end.wait(LOOK_S):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    if found:
        raise AssertionError("expected no secret in any command line, found\n" + "\n".join(sorted(found)))


Needles = Sequence[tuple[str, str, bytes]]
"""Whose, how written, what to look for."""


def _all_needles(secrets: Mapping[str, str]) -> Needles:
    __tracebackhide__ = True
    short = [name for name, value in secrets.items() if len(value) < SHORTEST]
    if short or not secrets:
        raise ValueError(f"expected secrets of {SHORTEST} characters or more, found shorter or none: {short}")
    written = {
        (name, how, needle)
        for name, value in secrets.items()
        for how, needle in _ways(value)
        if len(needle) >= SHORTEST
    }
    return sorted(written)


def _ways(value: str) -> Iterator[tuple[str, bytes]]:
    data = value.encode()
    yield "as it is", data
    for how, text in (("as JSON", json.dumps(value)[1:-1]), ("as in a URL", urllib.parse.quote(value, safe=""))):
        if text != value:
            yield how, text.encode()
    for before in range(3):
        # What stands before and behind it changes the characters at the ends only.
        encoded = base64.b64encode(b"\0" * before + data)
        core = encoded[-(-8 * before // 6) : 8 * (before + len(data)) // 6]
        yield "in base64", core
        yield "in base64", core.translate(bytes.maketrans(b"+/", b"-_"))


def _files(folder: Path, but: Sequence[Path]) -> Iterator[Path]:
    for path in sorted([folder] if folder.is_file() else folder.rglob("*")):
        if any(path.is_relative_to(left_out) for left_out in but):
            continue
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


def _in_file(file: Path, needles: Needles) -> list[tuple[str, str]]:
    found = [(name, "in its name") for name, _ in _in(str(file).encode(), needles)]
    try:
        with file.open("rb") as opened:
            if opened.seek(0, io.SEEK_END) == 0:
                return found
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found += _in(data, needles)
                if data[:16] == b"SQLite format 3\0":
                    found += _in_database(file, needles)
    except FileNotFoundError:  # removed since it was listed
        return found
    return sorted(set(found))


def _in(data: bytes | mmap.mmap, needles: Needles, depth: int = 0) -> list[tuple[str, str]]:
    found = [(name, how) for name, how, needle in needles if data.find(needle) >= 0]
    if depth < DEEPEST:
        for kind, part in _unpacked(data):
            found += [(name, f"{how}, {kind}") for name, how in _in(part, needles, depth + 1)]
    return found


def _unpacked(data: bytes | mmap.mmap) -> Iterator[tuple[str, bytes]]:
    for kind, magic, unpack in (
        ("in gzip", b"\x1f\x8b", gzip.decompress),
        ("in bzip2", b"BZh", bz2.decompress),
        ("in xz", b"\xfd7zXZ\0", lzma.decompress),
    ):
        if data[: len(magic)] == magic:
            with contextlib.suppress(OSError, EOFError, lzma.LZMAError, zlib.error):  # only begins like one
                yield kind, unpack(data[:])
    if data[:4] == b"PK\x03\x04":
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(data[:])) as archive:
            for member in archive.infolist():
                yield "in zip", member.filename.encode()
                yield "in zip", archive.read(member)


def _in_database(file: Path, needles: Needles) -> list[tuple[str, str]]:
    """What is longer than a page lies in pieces in the file."""
    with contextlib.suppress(sqlite3.DatabaseError):
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            dump = "\n".join(database.iterdump()).encode()
        return [(name, f"{how}, in a table") for name, how in _in(dump, needles)]
    return []
