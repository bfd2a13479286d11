"""Names that git has for the code, computed without it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.sources import git_blob, git_tree

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is absent")


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(["git", *author, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A package with what makes trees hard: a folder and files whose names begin alike, modes, other characters."""
    git(tmp_path, "init", "--quiet")
    package = tmp_path / "package"
    for name in ("a.py", "a/b.py", "a0.py", "Z.py", "grün.py", "deep/er/x.bin"):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 3)
    (package / "Z.py").chmod(0o755)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


@needs_git
def test_a_tree_is_gits(repository: Path) -> None:
    assert git_tree(repository / "package") == git(repository, "rev-parse", "HEAD:package")
    assert git_blob(b"Z.py" * 3) == git(repository, "rev-parse", "HEAD:package/Z.py")


@needs_git
def test_what_git_ignores_changes_nothing_and_all_else_does(repository: Path) -> None:
    package = repository / "package"
    committed = git_tree(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"x")
    (package / "empty" / "emptier").mkdir(parents=True)
    (package / ".cache").write_bytes(b"x")
    assert git_tree(package) == committed
    seen = {committed}
    for change in (
        lambda: (package / "Z.py").chmod(0o644),
        lambda: (package / "a" / "b.py").write_bytes(b"other"),
        lambda: (package / "new.py").write_bytes(b""),
        lambda: (package / "a0.py").rename(package / "a1.py"),
    ):
        change()
        seen.add(git_tree(package))
    assert len(seen) == 5


@needs_git
def test_the_documented_command_finds_the_commit(repository: Path) -> None:
    first, tree = git(repository, "rev-parse", "HEAD"), git_tree(repository / "package")
    for number in (1, 2):
        (repository / "package" / "a.py").write_text(f"later {number}")
        git(repository, "commit", "--quiet", "--all", "-m", "later")
    assert git(repository, "log", "--all", "--format=%H", "-t", f"--find-object={tree}").splitlines()[-1] == first
