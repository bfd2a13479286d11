from __future__ import annotations

from pathlib import Path

import pytest

from mshnet.errors import InputError
from pipelines.tracking_uri import absolute, artifact_location, sqlite_file


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("sqlite:///mlflow.db", "{cwd}/mlflow.db"),
        ("sqlite:///s", "{cwd}/s"),
        ("sqlite:///a/../b.db?timeout=30", "{cwd}/b.db?timeout=30"),
        ("sqlite:////data/mlflow.db", "/data/mlflow.db"),
    ],
)
def test_a_database_file_is_the_same_from_any_folder(
    given: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = absolute(given)
    assert uri == "sqlite:///" + path.format(cwd=tmp_path.resolve())
    monkeypatch.chdir("/")
    assert absolute(uri) == uri
    file = Path(path.format(cwd=tmp_path.resolve()).partition("?")[0])
    assert sqlite_file(uri) == file
    assert artifact_location(uri) == f"file://{file.parent}/mlartifacts"


@pytest.mark.parametrize("uri", ["http://tracker:5000", "https://tracker", "postgresql+psycopg2://u@db/mlflow"])
def test_a_server_is_left_as_it_is_and_keeps_its_own_artifacts(uri: str) -> None:
    assert (absolute(uri), sqlite_file(uri), artifact_location(uri)) == (uri, None, None)


@pytest.mark.parametrize(
    "uri", ["mlruns", "", "file:///runs", "sqlite:///", "sqlite:///:memory:", "sqlite://", "sqlite:///?timeout=1"]
)
def test_what_cannot_be_shared_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"expected a tracking URI such as sqlite:///mlflow\.db"):
        absolute(uri)
