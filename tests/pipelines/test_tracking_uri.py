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


def test_the_environment_names_the_tracker_where_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for named, expected in (
        ("http://tracker:5000", "http://tracker:5000"),
        ("sqlite:///theirs.db", f"sqlite:///{tmp_path.resolve()}/theirs.db"),
        ("", f"sqlite:///{tmp_path.resolve()}/outputs/mlflow.db"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
        assert absolute("") == expected
        assert absolute("http://other") == "http://other"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@tracker")
    with pytest.raises(InputError, match="without credentials") as caught:
        absolute("")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://tracker:5000",
        "https://tracker",
        "http://tracker:5000/a@b",
        "postgresql+psycopg2://u@db/mlflow",
        "postgresql://u@db:5432/mlflow?sslmode=require",
    ],
)
def test_a_server_is_left_as_it_is_and_keeps_its_own_artifacts(uri: str) -> None:
    assert (absolute(uri), sqlite_file(uri), artifact_location(uri)) == (uri, None, None)


def test_a_database_file_may_have_any_name() -> None:
    assert absolute("sqlite:////data/a:b@c.db") == "sqlite:////data/a:b@c.db"


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("https://me:hunter2@tracker", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("https://hunter2@tracker/path", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("HTTP://me:hunter2/x@tracker:5000", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("https://tracker?token=hunter2", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://u:hunter2@host/db", "run an MLflow server in front of the database .* PGPASSWORD"),
        ("postgresql+psycopg2://u:123/hunter2@host:5432/db", "run an MLflow server in front of the database"),
        ("mysql+pymysql://:hunter2@host/db", "run an MLflow server in front of the database"),
        ("postgresql://u@host/db?password=hunter2", "run an MLflow server in front of the database"),
        ("sqlite://u:hunter2@host", "run an MLflow server in front of the database"),
    ],
)
def test_a_password_is_refused_and_not_repeated(uri: str, advice: str) -> None:
    with pytest.raises(InputError, match=rf"expected a tracking URI without credentials, found a .*{advice}") as caught:
        absolute(uri)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["mlruns", "file:///runs", "sqlite:///", "sqlite:///:memory:", "sqlite://", "sqlite:///?timeout=1"]
)
def test_what_cannot_be_shared_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"expected a tracking URI such as sqlite:///mlflow\.db"):
        absolute(uri)
