"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mshnet.data.files import write_atomically


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


def test_other_file_systems_take_it_whole() -> None:
    write_atomically("memory://somewhere/x.bin", b"data")
    assert fsspec.filesystem("memory").cat_file("/somewhere/x.bin") == b"data"
