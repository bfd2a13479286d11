"""infra/secrets.sh: made once, closed, never shown."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "secrets.sh"


def run(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The script, for an operator with that home folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MSHNET_"))}
    environment = kept | {"HOME": str(home)} | more
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=120)


def values(file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_is_missing_is_made_closed_and_not_shown(tmp_path: Path) -> None:
    done = run(tmp_path, "--own-object-store")
    assert done.returncode == 0, done.stderr
    token, env_file = tmp_path / ".ray" / "auth_token", tmp_path / ".mshnet" / "cluster.env"
    assert [mode(path) for path in (token, env_file)] == [0o600, 0o600]
    assert [mode(path.parent) for path in (token, env_file)] == [0o700, 0o700]
    found = values(env_file)
    assert found["MLFLOW_TRACKING_USERNAME"] == "mshnet"
    secrets = [found["MLFLOW_TRACKING_PASSWORD"], found["AWS_ACCESS_KEY_ID"], found["AWS_SECRET_ACCESS_KEY"]]
    assert [len(secret) for secret in secrets] == [64, 20, 64]
    assert len({*secrets, token.read_text()}) == 4
    assert not any(secret in done.stdout + done.stderr for secret in [*secrets, token.read_text().strip()])


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    token, env_file = tmp_path / ".ray" / "auth_token", tmp_path / ".mshnet" / "cluster.env"
    token.write_text("a token that Ray made, readable by everybody")
    assert run(tmp_path).returncode == 0
    assert token.read_text() == "a token that Ray made, readable by everybody"
    assert mode(token) == 0o600
    with open(env_file, "a") as file:
        file.write("AWS_ENDPOINT_URL=http://192.0.2.1\n")
    before = values(env_file)
    assert "AWS_ACCESS_KEY_ID" not in before
    assert run(tmp_path, "--own-object-store").returncode == 0
    after = values(env_file)
    assert {key: after[key] for key in before} == before
    assert after["MSHNET_OWN_OBJECT_STORE"] == "1"
    assert run(tmp_path, "--own-object-store").returncode == 0
    assert values(env_file) == after


def test_another_place_can_be_named(tmp_path: Path) -> None:
    assert run(tmp_path, MSHNET_SECRETS=str(tmp_path / "elsewhere" / "env")).returncode == 0
    assert "MLFLOW_TRACKING_PASSWORD" in values(tmp_path / "elsewhere" / "env")
    assert not (tmp_path / ".mshnet").exists()


@pytest.mark.parametrize("option", ["--own", "help"])
def test_an_unknown_option_makes_nothing(tmp_path: Path, option: str) -> None:
    done = run(tmp_path, option)
    assert done.returncode == 1
    assert "--own-object-store" in done.stderr
    assert list(tmp_path.iterdir()) == []
