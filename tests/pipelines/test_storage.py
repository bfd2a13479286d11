"""Local paths and fsspec URIs alike."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import socket
import traceback
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mshnet.data.filesystem import filesystem
from mshnet.errors import InputError
from pipelines import storage
from tests.object_store import ObjectStore


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place, once of each kind."""
    if request.param == "local":
        yield str(tmp_path / "with space")
        return
    uri = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else request.getfixturevalue("s3_folder") + "/ü x"
    yield uri
    storage.remove(uri)


def test_local_paths_are_made_absolute_and_uris_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("outputs/../store") == os.path.join(os.getcwd(), "store")
    assert storage.absolute("~/store") == "/home/someone/store"
    assert storage.absolute("/store/") == "/store"
    for uri in ("s3://bucket/store", "memory://store", "file:///store", "file:///", "s3://b/[1]*?"):
        assert storage.absolute(uri) == uri


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://b/x//", "s3://b/x"),
        ("s3://b//x///y/", "s3://b/x/y"),
        ("s3://b/", "s3://b"),
        ("memory://x//y/", "memory://x/y"),
        ("file:////a//b/", "file:///a/b"),
        ("zip://a//b::s3://c//d/", "zip://a/b::s3://c/d"),
    ],
)
def test_a_place_has_one_spelling(given: str, kept: str) -> None:
    assert storage.absolute(given) == kept


def test_an_empty_place_is_none() -> None:
    with pytest.raises(InputError, match=r"expected a folder or URI, found an empty one; name one, such as"):
        storage.absolute("")


@pytest.mark.parametrize("uri", ["memory://exp[1]/store", "memory://exp*", "gs://bucket/what?"])
def test_a_place_that_would_be_a_pattern_is_refused(uri: str) -> None:
    with pytest.raises(InputError) as caught:
        storage.check_writable(uri)
    assert f"expected a URI without any of * ? [, found {uri!r}" in str(caught.value)


def test_credentials_are_refused_before_anything_is_repeated() -> None:
    for uri in ("gs://hunter2@bucket/a*", "https://host/a?sig=hunter2", "s3://key:hunter2@bucket"):
        with pytest.raises(InputError, match="without credentials") as caught:
            storage.absolute(uri)
        assert "hunter2" not in str(caught.value)


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


@pytest.mark.parametrize("name", ["exp[1]", "exp?", "exp*"])
@pytest.mark.parametrize("root", ["local", "s3"], indirect=True)
def test_a_name_is_never_a_pattern(root: str, name: str) -> None:
    kept, gone = storage.join(root, "exp1", "scratch", "a"), storage.join(root, name, "scratch", "a")
    for remove in (lambda: storage.remove(storage.join(root, name, "scratch")), lambda: delete_dir(root, name)):
        storage.write_bytes(kept, b"kept")
        storage.write_bytes(gone, b"gone")
        assert storage.sizes(storage.join(root, name, "scratch")) == {"a": 4}
        remove()
        assert storage.read_bytes(kept) == b"kept"
        assert not storage.exists(gone)


def delete_dir(root: str, name: str) -> None:
    """As Ray Train deletes a checkpoint."""
    from ray.train.v2._internal.execution import storage as ray_storage

    path, arrow = storage.for_arrow(root)
    ray_storage.delete_fs_path(arrow, f"{path}/{name}/scratch")


def test_folders_are_still_put_found_and_globbed(s3_folder: str, tmp_path: Path) -> None:
    for name in ("a", "deep/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    fs, path = filesystem(s3_folder)
    fs.put(f"{tmp_path}/", f"{path}/x[1]", recursive=True)
    assert fs.find(f"{path}/x[1]") == [f"{path}/x[1]/a", f"{path}/x[1]/deep/b"]
    assert fs.glob(f"{path}/x*/deep/*") == [f"{path}/x[1]/deep/b"]
    fs.get(f"{path}/x[1]/", f"{tmp_path}/back", recursive=True)
    assert (tmp_path / "back" / "deep" / "b").read_bytes() == b"x"


def test_a_folder_is_listed_with_sizes(root: str) -> None:
    assert storage.sizes(root) == {}
    for name, size in (("a b.bin", 3), ("c", 0), ("deep/d", 5)):
        storage.write_bytes(storage.join(root, name), b"x" * size)
    assert storage.sizes(root) == {"a b.bin": 3, "c": 0}
    assert storage.size_bytes(storage.join(root, "deep")) is None  # a folder is no file
    storage.write_bytes(storage.join(root, "c"), b"new")
    assert storage.sizes(root + "/")["c"] == 3


def test_hash_of_a_file(root: str) -> None:
    data = os.urandom(100_000)
    uri = storage.join(root, "file.bin")
    assert storage.sha256(uri) is None
    storage.write_bytes(uri, data)
    assert storage.sha256(uri) == hashlib.sha256(data).hexdigest()


def test_json_is_created_once(root: str) -> None:
    uri = storage.join(root, "manifest.json")

    def create(number: int) -> bool:
        return storage.create_json(uri, {"number": number})

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8))) if not root.startswith("memory") else [create(i) for i in range(8)]
    assert won.count(True) == 1
    assert storage.read_json(uri) == {"number": won.index(True)}


def test_a_place_that_can_be_written_to_is_left_as_it_was(root: str) -> None:
    storage.check_writable(storage.join(root, "new"))
    assert storage.sizes(storage.join(root, "new")) == {}


def test_a_local_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for uri in (f"{tmp_path}/file", f"{tmp_path}/file/below", "/proc/mshnet", f"file://{tmp_path}/file"):
        with pytest.raises(InputError, match=rf"expected a place to write to at '{uri}', found .*; give a folder"):
            storage.check_writable(uri)
    with pytest.raises(InputError, match="Protocol not known: s4"):
        storage.check_writable("s4://bucket")


@pytest.mark.usefixtures("s3_folder")
def test_a_bucket_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"'s3://no-such-bucket/store', found no such bucket; .*AWS_ENDPOINT_URL"):
        storage.check_writable("s3://no-such-bucket/store")
    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        storage.write_bytes("s3://no-such-bucket/store", b"")  # does not make it
    with pytest.raises(InputError, match=r"found ValueError: .*Invalid bucket name"):
        storage.check_writable("s3://a b/store")


KEY_ID, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG"
WRONG = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}


@pytest.mark.parametrize("trouble", ["key id", "secret", "none", "profile", "half"])
def test_wrong_credentials_are_said_without_them(
    trouble: str, s3_folder: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    import botocore.session

    known = botocore.session.get_session().get_credentials()
    caplog.set_level(logging.DEBUG, logger="mshnet")
    caplog.set_level(logging.DEBUG, logger="pipelines")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    tried = {
        "key id": WRONG,
        "secret": {**WRONG, "AWS_ACCESS_KEY_ID": known.access_key},
        "none": {},
        "profile": {"AWS_PROFILE": "nobody"},
        "half": {"AWS_ACCESS_KEY_ID": KEY_ID},
    }[trouble]
    absent = {"AWS_SHARED_CREDENTIALS_FILE": "/absent", "AWS_CONFIG_FILE": "/absent", "AWS_EC2_METADATA_DISABLED": "1"}
    for name, value in {**absent, **tried, "AWS_ENDPOINT_URL": object_store.endpoint}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"found no credentials that may write to it.*set AWS_PROFILE") as caught:
        storage.check_writable(s3_folder)
    with pytest.raises(InputError, match=r"found no credentials that may read it.*set AWS_PROFILE"):
        storage.check_readable(s3_folder)
    texts = ["".join(traceback.format_exception(caught.value)), caplog.text, str(pickle.dumps(caught.value))]
    for secret in (KEY_ID, SECRET, known.access_key, known.secret_key):
        assert not any(secret in text for text in texts)


@pytest.mark.parametrize("trouble", ["refused", "silent"])
def test_a_server_that_is_not_there_is_said_within_seconds(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and says nothing
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if trouble == "refused":
            listener.close()
        for name, value in {**WRONG, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=rf"no answer from the object store.*{address}.*correct AWS_ENDPOINT_URL"):
            storage.check_writable("s3://mshnet/store")
        with pytest.raises(InputError, match="start the server, or correct AWS_ENDPOINT_URL"):
            storage.check_readable("s3://mshnet/store")


def test_settings_that_are_wrong_are_not_a_server_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("[profile\nregion")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**WRONG, "AWS_CONFIG_FILE": str(tmp_path / "config")}.items():
        monkeypatch.setenv(name, value)
    for check in (storage.check_writable, storage.check_readable):
        with pytest.raises(InputError, match=rf"config file.*{tmp_path}/config.*; mend it \(AWS_CONFIG_FILE, "):
            check("s3://mshnet/store")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/absent")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@127.0.0.1:1")
    with pytest.raises(InputError, match=r"without user and password.*; mend it .*AWS_ENDPOINT_URL") as caught:
        storage.check_writable("s3://mshnet/store")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("root", ["local", "s3"], indirect=True)
def test_ray_train_keeps_its_checkpoints_there(root: str, tmp_path: Path) -> None:
    """What Ray Train does with its storage, by its own functions, with a file system that was sent to a worker."""
    from ray.train.v2._internal.execution import storage as ray_storage

    path, arrow = storage.for_arrow(root)
    arrow = pickle.loads(pickle.dumps(arrow))
    context = ray_storage.StorageContext(storage_path=path, experiment_dir_name="run", storage_filesystem=arrow)
    run, made = context.experiment_fs_path, tmp_path / "made"
    (made / "deep").mkdir(parents=True)
    (made / "progress.json").write_text("{}")
    (made / "deep" / "state.pt").write_bytes(os.urandom(20_000_000))  # more than one part
    for name in ("checkpoint_1", "checkpoint_2"):
        ray_storage._upload_to_fs_path(str(made), arrow, f"{run}/{name}")
    assert storage.sizes(storage.join(root, "run", "checkpoint_1", "deep")) == {"state.pt": 20_000_000}
    ray_storage.delete_fs_path(arrow, f"{run}/checkpoint_1")
    assert not ray_storage._exists_at_fs_path(arrow, f"{run}/checkpoint_1")
    found = [name for name in ray_storage._list_at_fs_path(arrow, run) if not name.startswith(".")]
    assert found == ["checkpoint_2"]
    ray_storage._download_from_fs_path(arrow, f"{run}/checkpoint_2", str(tmp_path / "back"))
    assert (tmp_path / "back" / "progress.json").read_text() == "{}"
    assert (tmp_path / "back" / "deep" / "state.pt").read_bytes() == (made / "deep" / "state.pt").read_bytes()
    arrow.delete_dir_contents(f"{run}/checkpoint_2")
    assert storage.sizes(storage.join(root, "run", "checkpoint_2")) == {}


def test_arrow_writes_where_we_read(root: str) -> None:
    import pyarrow.fs

    path, arrow = storage.for_arrow(root)
    assert isinstance(arrow, pyarrow.fs.LocalFileSystem) == ("://" not in root)
    arrow.create_dir(f"{path}/run")
    with arrow.open_output_stream(f"{path}/run/state.pt") as file:
        file.write(b"state")
    assert storage.read_bytes(storage.join(root, "run", "state.pt")) == b"state"


def test_a_local_file_uri_is_local_to_arrow(tmp_path: Path) -> None:
    import pyarrow.fs

    path, arrow = storage.for_arrow(f"file://{tmp_path}")
    assert path == str(tmp_path)
    assert isinstance(arrow, pyarrow.fs.LocalFileSystem)


def test_folders_are_found_by_a_file_in_them(root: str) -> None:
    assert storage.folders_with(storage.join(root, "images"), "manifest.json") == []
    for name in ("images/b/manifest.json", "images/a/manifest.json", "images/c/deep/manifest.json", "images/file"):
        storage.write_bytes(storage.join(root, name), b"{}")
    found = storage.folders_with(storage.join(root, "images"), "manifest.json")
    assert found == [storage.join(root, "images", name) for name in ("a", "b")]
