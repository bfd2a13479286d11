"""The search for secrets finds them wherever they hide, and prints none."""

from __future__ import annotations

import base64
import gzip
import json
import sqlite3
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.secrets_left import assert_no_secret, no_secret_in_command_lines

SECRET = 'pass"word/+é%42'
SECRETS = {"PASSWORD": SECRET, "OTHER": "0123456789abcdef"}


def plain(file: Path) -> None:
    """Among binary bytes, across a mebibyte's border."""
    file.write_bytes(b"\xff" * (2**20 - 3) + SECRET.encode() + b"\0")


def in_json(file: Path) -> None:
    """Escaped."""
    file.write_text(json.dumps({"a": SECRET}))


def in_url(file: Path) -> None:
    """Percent-encoded."""
    file.write_text(f"http://user:{urllib.parse.quote(SECRET, safe='')}@host")


def in_gzip_in_zip(file: Path) -> None:
    """Compressed twice."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log.gz", gzip.compress(SECRET.encode()))


def in_sqlite(file: Path) -> None:
    """In a value that is longer than a page: at one of these places it lies across a page's end."""
    with sqlite3.connect(file) as database:
        database.execute("create table log (line text)")
        database.execute("insert into log values (?)", ("x" * 4090 + SECRET + "x" * 4090,))
    database.close()


def in_basic_authentication(user: str) -> Callable[[Path], None]:
    """As HTTP sends it."""
    return lambda file: file.write_bytes(b"Basic " + base64.b64encode(f"{user}:{SECRET}".encode())) and None


@pytest.mark.parametrize(
    "hide",
    [plain, in_json, in_url, in_gzip_in_zip, in_sqlite, *(in_basic_authentication("u" * n) for n in (1, 2, 3))],
)
def test_a_secret_is_found_and_named_but_not_printed(hide: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "innocent").write_text("nothing")
    hide(tmp_path / "guilty")
    with pytest.raises(AssertionError, match="guilty: PASSWORD") as caught:
        assert_no_secret(SECRETS, [tmp_path])
    assert "innocent" not in str(caught.value)
    assert "OTHER" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert assert_no_secret(SECRETS, [tmp_path], but=[tmp_path / "guilty"]) == 1


def test_a_secret_in_a_files_name_is_found(tmp_path: Path) -> None:
    (tmp_path / SECRETS["OTHER"]).mkdir()
    (tmp_path / SECRETS["OTHER"] / "file").touch()
    with pytest.raises(AssertionError, match="OTHER"):
        assert_no_secret(SECRETS, [tmp_path])


def test_a_look_that_could_find_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        assert_no_secret(SECRETS, [tmp_path])
    (tmp_path / "file").touch()
    assert assert_no_secret(SECRETS, [tmp_path]) == 1
    for secrets in ({}, {"EMPTY": ""}, {"SHORT": "1234567"}):
        with pytest.raises(ValueError, match="8 characters or more"):
            assert_no_secret(secrets, [tmp_path])


def test_a_command_line_with_a_secret_is_found_and_its_end_is_awaited() -> None:
    def waits(*arguments: str) -> None:
        subprocess.run([sys.executable, "-c", "import time; time.sleep(0.5)", *arguments], check=True)

    with no_secret_in_command_lines(SECRETS):
        waits("--quiet")
    with pytest.raises(AssertionError, match=r"process \d+ .*python.*: OTHER$"), no_secret_in_command_lines(SECRETS):
        waits(f"--password={SECRETS['OTHER']}")
