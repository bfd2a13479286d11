"""What several of these files need."""

from __future__ import annotations

import pytest
import ray

from pipelines.tracking_client import client


@pytest.fixture(scope="module")
def without_ray() -> None:
    """No Ray that a file before left running: it would draw the bars, and write warnings of its own between them."""
    if ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A migrated, empty MLflow database: making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()
