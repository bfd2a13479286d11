"""How MLflow is reached, for the modules that know it (`tracking`, `tracking_registry`, `tracking_search`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from mshnet.errors import InputError
from pipelines.tracking_uri import sqlite_file


def client(tracking_uri: str) -> Any:
    """An `MlflowClient` for an absolute URI; a SQLite file is made or migrated first."""
    from mlflow import MlflowClient

    _migrate_sqlite(tracking_uri)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def quotable(text: str) -> str:
    """The text, for use between quotes in MLflow's filters. InputError where it holds any."""
    if "'" in text or "`" in text:
        raise InputError(f"expected a name without quotes, got {text!r}")
    return text


@cache
def _migrate_sqlite(tracking_uri: str) -> None:
    """Make or migrate a SQLite file, one process at a time; MLflow's own lock lets several do it at once."""
    import fcntl

    from mlflow import MlflowClient

    file = sqlite_file(tracking_uri)
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        file.with_name(f"{file.name}.lock").open("w") as lock,
        quiet("alembic"),
        quiet("mlflow.store.db.utils"),
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        MlflowClient(tracking_uri=tracking_uri)


@contextmanager
def quiet(logger_name: str) -> Iterator[None]:
    """That logger's information messages off, warnings on."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
