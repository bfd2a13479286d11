"""What several of these files need."""

from __future__ import annotations

import pytest
import ray


@pytest.fixture(scope="module")
def without_ray() -> None:
    """No Ray that a file before left running: it would draw the bars, and write warnings of its own between them."""
    if ray.is_initialized():
        ray.shutdown()
