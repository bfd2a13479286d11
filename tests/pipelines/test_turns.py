"""Turns among processes of one real Ray."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import ray

from pipelines.cluster import connected
from pipelines.turns import turn

pytestmark = pytest.mark.cluster


def enter(folder: str) -> bool:
    """Whether it had to wait."""
    Path(folder, "trying").touch()
    with turn("a fold", "train fold 0") as waited:
        return waited


def die_inside(folder: str) -> None:
    """As a node that is lost."""
    with turn("a fold", "train fold 0"):
        Path(folder, "died").touch()
        os._exit(1)


def test_one_at_a_time_and_a_lost_holder_holds_nothing_up(tmp_path: Path) -> None:
    with connected():
        one = ray.remote(num_cpus=0, max_retries=0)
        with turn("a fold", "train fold 0") as waited:
            assert not waited
            other = one(enter).remote(str(tmp_path))
            until = time.monotonic() + 120
            while not (tmp_path / "trying").exists():
                assert time.monotonic() < until
                time.sleep(0.1)
            assert ray.wait([other], timeout=5)[0] == [], "it is inside too"
        assert ray.get(other, timeout=120)
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(one(die_inside).remote(str(tmp_path)), timeout=120)
        assert (tmp_path / "died").exists()
        ray.get(one(enter).remote(str(tmp_path)), timeout=120)
