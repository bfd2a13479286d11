"""Local paths and fsspec URIs alike."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mshnet.errors import InputError
from pipelines import storage


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place, once of each kind."""
    if request.param == "local":
        yield str(tmp_path)
        return
    uri = f"memory://{uuid.uuid4().hex}"
    yield uri
    storage.remove(uri)


def test_local_paths_are_made_absolute_and_uris_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("outputs/../store") == os.path.join(os.getcwd(), "store")
    assert storage.absolute("~/store") == "/home/someone/store"
    assert storage.absolute("/store/") == "/store"
    for uri in ("s3://bucket/store", "memory://store", "file:///store", ""):
        assert storage.absolute(uri) == uri


def test_join_and_below_are_inverse() -> None:
    for root in ("/store", "s3://bucket/store"):
        place = storage.join(root, "folds", "0", "result.json")
        assert place == f"{root}/folds/0/result.json"
        assert storage.below(root, place) == "folds/0/result.json"
        assert storage.below(root + "/", place) == "folds/0/result.json"
    for other in ("/storehouse/a", "/store", "/elsewhere/a"):
        with pytest.raises(ValueError, match=rf"'{other}' is not below '/store'"):
            storage.below("/store", other)


def test_bytes_come_back_with_their_size(root: str) -> None:
    uri = storage.join(root, "deep", "file.bin")
    assert not storage.exists(uri)
    assert storage.size_bytes(uri) is None
    storage.write_bytes(uri, b"\x00\xff" * 50)
    assert storage.exists(uri)
    assert storage.size_bytes(uri) == 100
    assert storage.read_bytes(uri) == b"\x00\xff" * 50
    storage.write_bytes(uri, b"again")
    assert storage.read_bytes(uri) == b"again"


def test_json_comes_back_and_absence_is_none(root: str) -> None:
    uri = storage.join(root, "result.json")
    assert storage.read_json(uri) is None
    storage.write_json(uri, {"value": 0.1, "names": ["é"], "none": None})
    assert storage.read_json(uri) == {"value": 0.1, "names": ["é"], "none": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(uri, {"value": float("nan")})
    assert storage.read_json(uri) == {"value": 0.1, "names": ["é"], "none": None}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"value": 1', "expected JSON in {uri!r}: .*; delete the file to make it again"),
        (b"", "expected JSON in {uri!r}: "),
        (b"\xff\xfe\x00", "expected JSON in {uri!r}: "),
        (b"[1]", "expected a JSON object in {uri!r}, found list; delete it to make it again"),
    ],
)
def test_damaged_json_is_named(root: str, data: bytes, message: str) -> None:
    uri = storage.join(root, "result.json")
    storage.write_bytes(uri, data)
    with pytest.raises(InputError, match=message.format(uri=uri)):
        storage.read_json(uri)


def test_a_folder_is_removed_with_all_in_it_and_nothing_else(root: str) -> None:
    for name in ("run/a", "run/deep/b", "runner/c"):
        storage.write_bytes(storage.join(root, name), b"x")
    storage.remove(storage.join(root, "run"))
    storage.remove(storage.join(root, "run"))
    assert not storage.exists(storage.join(root, "run"))
    assert storage.read_bytes(storage.join(root, "runner/c")) == b"x"


def test_arrow_writes_where_we_read(root: str) -> None:
    import pyarrow.fs

    path, filesystem = storage.for_arrow(root)
    assert isinstance(filesystem, pyarrow.fs.LocalFileSystem) == ("://" not in root)
    filesystem.create_dir(f"{path}/run")
    with filesystem.open_output_stream(f"{path}/run/state.pt") as file:
        file.write(b"state")
    assert storage.read_bytes(storage.join(root, "run", "state.pt")) == b"state"


def test_a_local_file_uri_is_local_to_arrow(tmp_path: Path) -> None:
    import pyarrow.fs

    path, filesystem = storage.for_arrow(f"file://{tmp_path}")
    assert path == str(tmp_path)
    assert isinstance(filesystem, pyarrow.fs.LocalFileSystem)


def test_folders_are_found_by_a_file_in_them(root: str) -> None:
    assert storage.folders_with(storage.join(root, "images"), "manifest.json") == []
    for name in ("images/b/manifest.json", "images/a/manifest.json", "images/c/deep/manifest.json", "images/file"):
        storage.write_bytes(storage.join(root, name), b"{}")
    found = storage.folders_with(storage.join(root, "images"), "manifest.json")
    assert found == [storage.join(root, "images", name) for name in ("a", "b")]
