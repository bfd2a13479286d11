"""What a number must lead back to: commit, packages, data, configuration."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.config import CrossValidationConfig
from pipelines.scan import Scan

PACKAGES = ("mshnet", "torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow", "pycocotools", "pillow", "fsspec")
COMMIT_VARIABLE = "MSHNET_GIT_COMMIT"


def git_commit() -> str:
    """The commit of this code, with "-dirty" where the tree differs; MSHNET_GIT_COMMIT where there is no git.

    A submitted job's upload has no .git, so the variable is how its commit gets there.
    """
    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


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


def tags(config: CrossValidationConfig, scanned: Scan, weights: str) -> dict[str, str]:
    """MLflow tags by which runs are told apart and traced back."""
    return {
        "dataset": config.dataset,
        "backbone": config.model.backbone,
        "similarity": config.model.similarity,
        "shot": str(config.shot),
        "protocol": config.evaluation.protocol,
        "selection": config.validation.selection,
        "mask_mode": scanned.mask_mode,
        "git_commit": git_commit(),
        **{f"fingerprint.{name}": value for name, value in fingerprints(scanned, weights).items()},
        **{f"version.{name}": value for name, value in versions().items()},
    }
