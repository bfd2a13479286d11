"""Which file system serves a URI, and which URIs are refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from mshnet.data.filesystem import filesystem, is_local, is_s3, refuse_secrets
from mshnet.errors import InputError

SECRET = "hunter2/Xy"


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had set up anything for S3."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["plain.bin", "with space.bin", "bücher ☃.bin", "a::b.bin", "50%?#.bin", "a@b:c.bin"])
def test_local_files_by_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"data")
    for uri in (str(tmp_path / name), f"file://{tmp_path / name}"):
        fs, path = filesystem(uri)
        assert isinstance(fs, LocalFileSystem)
        assert path == str(tmp_path / name)
        assert fs.cat_file(path) == b"data"


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert filesystem("a/b")[1] == f"{tmp_path}/a/b"
    assert filesystem("~/store")[1] == "/home/someone/store"


def test_other_file_systems_keep_their_own() -> None:
    fs, path = filesystem("memory://bucket/bücher/a b")
    fs.pipe_file(path, b"data")
    assert filesystem("memory://bucket/bücher")[0].ls("/bucket/bücher", detail=False) == ["/bucket/bücher/a b"]


def test_kinds_of_uri() -> None:
    assert [is_local(uri) for uri in ("/a", "a", "", "file:///a", "s3://b/a", "memory://a")] == [True] * 4 + [False] * 2
    assert [is_s3(uri) for uri in ("s3://b/a", "s3a://b/a", "s3", "/s3://", "gs://b")] == [True] * 2 + [False] * 3


@pytest.mark.parametrize("uri", ["no-such-kind://bucket/a", "s4://bucket"])
def test_an_unknown_kind_is_named(uri: str) -> None:
    with pytest.raises(InputError, match=f"expected a local path, s3://BUCKET/.*found '{uri}'.*Protocol not known"):
        filesystem(uri)


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/store",
        "s3://hunter2@bucket/store",
        f"s3a://key:{SECRET}@bucket",
        f"ftp://user:{SECRET}@host/store",
        f"simplecache::ftp://user:{SECRET}@host/store",
        f"s3://bucket/store?X-Amz-Signature={SECRET}",
        f"s3://bucket/store?versionId=1&AWSAccessKeyId={SECRET}",
        f"https://host/store?sv=1&sig={SECRET}",
        f"gs://bucket/store?access_token={SECRET}",
        f"s3://bucket/store?aws_secret_access_key={SECRET}",
        "https://hunter2@host/store",
        "gs://hunter2@bucket/store",
        "s3://AKIA:123/hunter2@bucket/store",
        "s3://AKIA:123@bucket/store",
        "S3://AKIA:123/hunter2@bucket/store",
        "simplecache::https://hunter2@host/store",
        f"abfs://container:{SECRET}@account.dfs.core.windows.net/store",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(InputError, match=r"expected a URI without credentials.*AWS_PROFILE") as caught:
        filesystem(uri)
    assert "hunter2" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/images@2x/a:b@c.png",
        "s3://bucket/what?.json",
        "s3://bucket/store?versionId=3",
        "http://host:9000/store/a@b",
        "abfs://container@account.dfs.core.windows.net/store",
        "abfss://container@account.dfs.core.windows.net/store",
        "memory://a b/ü?x=y",
    ],
)
def test_names_that_only_look_like_credentials_pass(uri: str) -> None:
    refuse_secrets(uri)


@pytest.mark.usefixtures("no_aws")
def test_the_environment_decides_on_the_store_at_the_time_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    first, path = filesystem("s3://bucket/a b/ü?.json")
    assert path == "bucket/a b/ü?.json"
    assert filesystem("s3://bucket/other")[0] is first
    assert filesystem("s3://bucket/other", quick=True)[0] is not first
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:2")
    assert filesystem("s3://bucket/other")[0] is not first


@pytest.mark.usefixtures("no_aws")
def test_neither_a_pickle_nor_a_printed_store_knows_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    fs, _ = filesystem("s3://bucket/store")
    data = pickle.dumps(fs)
    assert type(pickle.loads(data)) is type(fs)
    for text in (data, repr(fs).encode(), fs.to_json().encode()):
        assert b"AKIA" not in text
        assert b"hunter2" not in text
