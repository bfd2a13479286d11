"""What a number must lead back to: commit, packages, data, configuration."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mshnet.protocols import Protocol, named
from pipelines import sources
from pipelines.config import CrossValidationConfig
from pipelines.scan import Scan

PACKAGES = ("mshnet", "torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow", "pycocotools", "pillow", "fsspec")
COMMIT_VARIABLE = "MSHNET_GIT_COMMIT"


def git_commit() -> str:
    """The commit of this code, with "-dirty" where the tree differs; MSHNET_GIT_COMMIT where it is set.

    A submitted job's upload has no .git: without the variable it is told by its trees, `git_trees`.
    """
    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    return _described() or "trees " + ", ".join(f"{name} {tree}" for name, tree in sources.trees().items())


def git_trees() -> dict[str, str]:
    """Of this code, as tags. `git log --all --format=%H -t --find-object=TREE` ends with the commit that brought it."""
    return {f"git_tree.{name}": tree for name, tree in sources.trees().items()}


def _described() -> str:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # or a repository around this folder would be asked
        return ""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        # An uploaded tree runs without being installed.
        return "not installed"


def fingerprints(scanned: Scan, weights: str) -> dict[str, str]:
    """Of the data and of the backbone's weights."""
    return {"data": scanned.fingerprint, "backbone_weights": weights}


def setting_tags(config: CrossValidationConfig) -> dict[str, str]:
    """MLflow tags by which settings are told apart."""
    model = config.model
    return {
        "dataset": config.dataset,
        **({"data_name": config.own.data_name} if config.own.data_name else {}),
        "shot": str(config.shot),
        "backbone": model.backbone,
        "architecture": model.architecture,
        "selection": config.selection,
        **({"similarity": model.similarity} if model.architecture == "mshnet" else {}),
    }


def protocol_tags(protocol: Protocol, episodes_hash: str) -> dict[str, str]:
    """MLflow tags by which measurements are told apart: only those of the same episodes are comparable."""
    return {
        "protocol": protocol.name,
        "protocol.label": protocol.label,
        "resize": protocol.resize,
        "ignored": protocol.ignore,
        "mask_mode": protocol.mask_mode,
        "split_lists": protocol.split_lists,
        "episodes_hash": episodes_hash,
    }


def tags(config: CrossValidationConfig, scanned: Scan, weights: str) -> dict[str, str]:
    """MLflow tags of a run that begins: by which it is found, and by which it is traced back."""
    judged = config.evaluation
    return {
        **setting_tags(config),
        "protocol": named(judged.episodes.draw, judged.episodes.episodes, judged.episodes.seeds),
        "resize": judged.resize,
        "ignored": judged.ignored,
        "mask_mode": scanned.mask_mode,
        "git_commit": git_commit(),
        **git_trees(),
        **{f"fingerprint.{name}": value for name, value in fingerprints(scanned, weights).items()},
        **{f"version.{name}": value for name, value in versions().items()},
    }
