"""Small generated data sets in the real layouts, written once per session; tests that break one copy it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mshnet.data.shapes import write_coco, write_voc


@pytest.fixture(scope="session")
def voc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images in the VOC layout. Read only."""
    root = tmp_path_factory.mktemp("shapes") / "voc"
    write_voc(root, images=30, size_px=64, seed=3)
    return root


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images in the COCO layout, three of them with a crowd. Read only."""
    root = tmp_path_factory.mktemp("shapes") / "coco"
    write_coco(root, images=48, size_px=64, seed=3)
    return root


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a data set that the test may break."""

    def copy(root: Path) -> Path:
        return Path(shutil.copytree(root, tmp_path / root.name))

    return copy
