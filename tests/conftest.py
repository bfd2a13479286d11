"""What every test may use: where the shared real data is, if this machine has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("MSHNET_SHARED", Path(__file__).resolve().parents[2] / "shared"))

needs_shared = pytest.mark.skipif(
    not (SHARED / "reference").is_dir(),
    reason="the shared reference data is absent (set MSHNET_SHARED to the folder that holds reference/ and data/)",
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the reference vectors and the real images."""
    return SHARED
