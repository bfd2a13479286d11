"""What leads a number back to its code."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import provenance, recipes, sources
from pipelines.scan import Scan

REPOSITORY = Path(__file__).resolve().parents[2]
SCAN = Scan(fingerprint="f" * 64, images=3, class_names=("disc",), mask_mode="drawn by hand")


def test_the_variable_names_the_commit_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123-submitted")
    assert provenance.git_commit() == "abc123-submitted"


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize("variable", [None, ""])
def test_without_the_variable_the_commit_is_the_checkouts(
    monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(provenance.COMMIT_VARIABLE, variable)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert provenance.git_commit().removesuffix("-dirty") == head.stdout.strip()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", provenance.git_commit())


def test_without_variable_and_git_the_code_is_told_by_its_trees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    trees = provenance.git_trees()
    assert provenance.git_commit() == (
        f"trees mshnet {trees['git_tree.mshnet']}, pipelines {trees['git_tree.pipelines']}"
    )
    assert all(re.fullmatch(r"[0-9a-f]{40}", tree) for tree in trees.values())


UPLOADED = "from pipelines import provenance; print(provenance.git_commit())"


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a git checkout")
def test_an_upload_inside_another_repository_does_not_take_its_commit(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "another"], check=True)
    upload = tmp_path / "upload"
    for package in ("mshnet", "pipelines"):
        shutil.copytree(REPOSITORY / package, upload / package)
    environment = {k: v for k, v in os.environ.items() if k != provenance.COMMIT_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", UPLOADED], cwd=upload, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "trees " + ", ".join(
        f"{package} {sources.git_tree(REPOSITORY / package)}" for package in ("mshnet", "pipelines")
    )


def test_versions_are_of_what_is_imported() -> None:
    import fsspec
    import numpy as np
    import pyarrow as pa

    versions = provenance.versions()
    assert set(versions) == {"python", *provenance.PACKAGES}
    assert versions["python"] == platform.python_version()
    assert (versions["numpy"], versions["pyarrow"], versions["fsspec"]) == (
        np.__version__, pa.__version__, fsspec.__version__
    )  # fmt: skip
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())


def test_tags_hold_all_that_runs_are_told_apart_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123")
    tags = provenance.tags(recipes.demo(), SCAN, "random")
    assert {name: value for name, value in tags.items() if not name.startswith("version.")} == {
        "dataset": "shapes",
        "backbone": "resnet18",
        "similarity": "both",
        "shot": "1",
        "architecture": "mshnet",
        "protocol": "balanced draw, 100 episodes",
        "resize": "square",
        "ignored": "excluded",
        "selection": "last",
        "mask_mode": "drawn by hand",
        "git_commit": "abc123",
        **provenance.git_trees(),
        "fingerprint.data": "f" * 64,
        "fingerprint.backbone_weights": "random",
    }
    assert {name for name in tags if name.startswith("version.")} == {
        f"version.{name}" for name in ("python", *provenance.PACKAGES)
    }
