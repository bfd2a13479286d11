"""A full temporary folder is named with what to do; other troubles are left to who knows about them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mshnet.data.temporary import temporary_room
from mshnet.errors import InputError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    message = f"expected room for a map in the temporary folder '{tmp_path}', found none .*{os.strerror(number)}.*; set"
    with pytest.raises(InputError, match=message), temporary_room("a map"):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass() -> None:
    with pytest.raises(ConnectionError, match="no answer"), temporary_room("a map"):
        raise ConnectionError("no answer")
