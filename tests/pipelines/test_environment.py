"""Packages, code and Python of a process against those of the job's driver."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mshnet.errors import InputError
from pipelines import environment

REPOSITORY = Path(__file__).resolve().parents[2]
PYTEST = importlib.metadata.version("pytest")


def test_what_is_installed_against_a_lock() -> None:
    lock = f"""# comment
pytest=={PYTEST}
PyTest_Timeout=={importlib.metadata.version("pytest-timeout")}  # other spelling
torch==0.1.2
no-such-package==1 ; python_version >= "3.11"
no-such-other==1 ; sys_platform == "win32"
"""
    torch = importlib.metadata.version("torch")
    assert environment.differences(lock) == (f"torch {torch} instead of 0.1.2", "no-such-package absent")
    assert environment.packages_problem(lock) == (
        f"expected the packages of requirements.lock, found torch {torch} instead of 0.1.2, no-such-package absent; "
        "run `make setup` there, or `ray up` again"
    )
    assert environment.packages_problem(f"pytest=={PYTEST}") == ""
    many = "\n".join(f"no-such-{i}==1" for i in range(9))
    assert "no-such-3 absent and 5 more; run" in environment.packages_problem(many)


def test_local_versions_are_the_same_version() -> None:
    """A machine's own build of torch, such as 2.15.0+cpu."""
    from packaging.requirements import Requirement

    assert Requirement("torch==2.15.0").specifier.contains("2.15.0+cpu", prereleases=True)


def test_this_projects_lock_is_read() -> None:
    assert environment.lock() == (REPOSITORY / "requirements.lock").read_text()
    assert "torch" not in " ".join(environment.differences(environment.lock()))


def test_a_process_without_the_variable_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    environment.check()
    monkeypatch.setenv(environment.VARIABLE, "")
    environment.check()


def test_a_process_with_other_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.VARIABLE, "0" * 12)
    with pytest.raises(InputError, match=r"^node .*: expected the code, the lock and the Python of the job's driver"):
        environment.check()


def test_a_process_with_other_packages_is_refused(tmp_path: Path) -> None:
    """In a process with a package of another version in front of the installed ones."""
    metadata = tmp_path / "fsspec-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: fsspec\nVersion: 1.0\n")
    done = subprocess.run(
        [sys.executable, "-c", "from pipelines import environment; environment.check()"],
        cwd=REPOSITORY,
        env=os.environ
        | {
            "PYTHONPATH": f"{tmp_path}:{REPOSITORY}",
            environment.VARIABLE: environment.identity(environment.lock()),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "expected the packages of requirements.lock, found fsspec 1.0 instead of" in done.stderr


def test_without_the_lock_the_message_says_how_it_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "pipelines" / "environment.py"))
    with pytest.raises(InputError, match=r"no such file; submit the whole repository .* or give --any-versions"):
        environment.lock()
