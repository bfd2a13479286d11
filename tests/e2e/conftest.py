"""The real commands on small generated data, each in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mshnet.data.shapes import write_voc

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = shlex.split(
    "--image-size-px 65 --min-object-px 100 --backbone resnet18 --backbone-weights random --epochs 2 "
    "--episodes-per-epoch 24 --learning-rate 0.02 --validation-episodes 12 --held-out-classes 2 "
    "--protocol balanced --evaluation-episodes 20 --threshold-episodes 10 --panels-each 1 "
    "--images-per-shard 60 --feature-cache-gib 1"
)


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> Any:
        """The JSON of the last line on stdout."""
        return json.loads(self.stdout.strip().splitlines()[-1])


PROMPT = {
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",  # they lack the job's environment, and are never used
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an end is noticed
}
"""Settings of Ray that change how long one waits, and nothing else."""


def start(command: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    """A Python command of the project, as a user would start it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=environment | PROMPT | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command: Sequence[str], cwd: Path, timeout_s: float = 1200) -> Outcome:
    """Start a command and wait for its end."""
    process = start(command, cwd)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Outcome(process.returncode, stdout, stderr)


def cross_validate(*flags: str) -> list[str]:
    """The job's command line."""
    return [str(REPOSITORY / "pipelines" / "cross_validate.py"), *flags]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated data set in the VOC layout."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_voc(root, images=160, size_px=80, seed=1)
    return root
