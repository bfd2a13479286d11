"""The code that runs here, by names that git has for it: a commit can be found by them where there is no .git."""

from __future__ import annotations

import hashlib
import stat
from functools import cache
from pathlib import Path

NO_SOURCES = ("__pycache__",)
"""Beside what begins with a dot or ends in one of `NO_SUFFIXES`: what git ignores inside the packages."""
NO_SUFFIXES = (".pyc", ".pyo", ".log")


def git_tree(folder: Path) -> str:
    """The id that git gives to a folder's tree, computed from the files; "" where it has none to hold."""
    entries: list[tuple[bytes, bytes]] = []
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in NO_SOURCES or path.name.endswith(NO_SUFFIXES):
            continue
        mode, digest = ("40000", git_tree(path)) if path.is_dir() else (_mode(path), git_blob(path.read_bytes()))
        if digest:  # git holds no empty folders
            # Of two names of which one begins with the other, a folder's is compared as if it ended with a slash.
            order = path.name.encode() + (b"/" if path.is_dir() else b"")
            entries.append((order, f"{mode} {path.name}\0".encode() + bytes.fromhex(digest)))
    return _named(b"tree", b"".join(entry for _, entry in sorted(entries))) if entries else ""


def git_blob(contents: bytes) -> str:
    """The id that git gives to a file's contents."""
    return _named(b"blob", contents)


@cache
def trees() -> dict[str, str]:
    """Of the packages that this process has imported."""
    import mshnet
    import pipelines

    return {package.__name__: git_tree(Path(package.__file__ or "").parent) for package in (mshnet, pipelines)}


def _mode(path: Path) -> str:
    return "100755" if path.stat().st_mode & stat.S_IXUSR else "100644"


def _named(kind: bytes, contents: bytes) -> str:
    header = kind + b" %d\0" % len(contents)
    return hashlib.sha1(header + contents, usedforsecurity=False).hexdigest()
