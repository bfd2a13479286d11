"""Reading finished cross-validations back from the experiment tracker."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mshnet.errors import InputError
from pipelines.results import CrossValidation, FoldResult, Interval
from pipelines.tracking_client import client, quotable
from pipelines.tracking_server import check
from pipelines.tracking_uri import absolute

PARENT_TAG = "mlflow.parentRunId"
FOLD_FILE = "fold.json"
RESULT_FILE = "cross_validation.json"
PAGE = 1000
"""Runs in one answer."""
READERS = 8
"""Threads that fetch artifacts."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A cross-validation as the tracker has it."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    """FINISHED, RUNNING, FAILED or KILLED."""
    started_ms: int
    params: Mapping[str, str]
    """The configuration, flattened: "model.backbone"."""
    tags: Mapping[str, str]
    folds: tuple[FoldResult, ...] = ()
    """In order; only of a finished one."""
    miou_interval: Interval | None = None
    """Of the mean over the folds, where it was recorded."""
    fb_iou_interval: Interval | None = None
    problem: str = ""
    """Why the folds of a finished one could not be read."""


def cross_validations(tracking_uri: str, experiment: str) -> list[TrackedRun]:
    """All of an experiment, newest first, searches and their trials left out; numbers from each fold's own record.

    Raises InputError for an experiment that is not there.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one a file
    connection = client(absolute(tracking_uri))
    found = connection.get_experiment_by_name(experiment)
    if found is None:
        known = ", ".join(sorted(other.name for other in connection.search_experiments())) or "none"
        raise InputError(f"no experiment {experiment!r} at {tracking_uri!r} (there are: {known}); give --experiment")
    runs = list(_runs(connection, found.experiment_id))
    children: dict[str, list[Any]] = {}
    for run in runs:
        if PARENT_TAG in run.data.tags:
            children.setdefault(run.data.tags[PARENT_TAG], []).append(run)
    parents = [run for run in runs if PARENT_TAG not in run.data.tags and _is_cross_validation(run)]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda run: _read(connection, run, children.get(run.info.run_id, ())), parents))


def exists(tracking_uri: str, run_id: str) -> bool:
    """Whether the tracker has the run, and it was not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        found = client(absolute(tracking_uri)).get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return bool(found.info.lifecycle_stage == "active")


def name_and_params(tracking_uri: str, run_id: str) -> tuple[str, dict[str, str]]:
    """Of one run. InputError where there is none, or no server that answers."""
    from mlflow.exceptions import MlflowException

    uri = absolute(tracking_uri)
    check(uri)
    try:
        run = client(uri).get_run(run_id)
    except MlflowException as error:
        raise InputError(f"expected a run {run_id} at {uri!r}, found none; check --tracking-uri") from error
    return str(run.info.run_name), dict(run.data.params)


def child_runs(tracking_uri: str, parent_run_id: str) -> list[str]:
    """Ids of the runs below a run, oldest first."""
    connection = client(absolute(tracking_uri))
    experiment_id = connection.get_run(parent_run_id).info.experiment_id
    below = f"tags.`{PARENT_TAG}` = '{quotable(parent_run_id)}'"
    found = connection.search_runs([experiment_id], below, order_by=["attributes.start_time ASC"])
    return [str(run.info.run_id) for run in found]


def file_of(tracking_uri: str, run_id: str, path: str) -> bytes:
    """An artifact's bytes; b"" where the run has none of that name."""
    return _artifact(client(absolute(tracking_uri)), run_id, path)


def page_of(tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """Address of a run's page on a server; "" for a SQLite file."""
    uri = absolute(tracking_uri)
    if not uri.startswith(("http://", "https://")):
        return ""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def _runs(connection: Any, experiment_id: str) -> Iterator[Any]:
    token = None
    while True:
        page = connection.search_runs(
            [experiment_id], max_results=PAGE, order_by=["attributes.start_time DESC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _is_cross_validation(run: Any) -> bool:
    return "search" not in run.data.tags and {"dataset", "shot", "model.backbone"} <= set(run.data.params)


def _read(connection: Any, run: Any, children: Sequence[Any]) -> TrackedRun:
    folds: list[FoldResult] = []
    problem, whole = "", None
    if run.info.status == "FINISHED":
        try:
            texts = [_artifact(connection, child.info.run_id, FOLD_FILE) for child in children if _is_fold(child)]
            folds = sorted((FoldResult.from_json(text) for text in texts if text), key=lambda fold: fold.fold)
            if not folds:
                problem = f"no {FOLD_FILE} in the runs of its folds"
            whole = _whole(connection, run.info.run_id)
        except InputError as error:
            folds, problem = [], str(error)
    return TrackedRun(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        started_ms=run.info.start_time or 0,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        folds=tuple(folds),
        miou_interval=whole.miou_interval if whole else None,
        fb_iou_interval=whole.fb_iou_interval if whole else None,
        problem=problem,
    )


def _is_fold(child: Any) -> bool:
    return child.info.status == "FINISHED" and "fold" in child.data.tags


def _whole(connection: Any, run_id: str) -> CrossValidation | None:
    text = _artifact(connection, run_id, RESULT_FILE)
    return CrossValidation.from_json(text) if text else None


def _artifact(connection: Any, run_id: str, path: str) -> bytes:
    """An artifact's bytes; b"" where the run has none of that name."""
    folder = path.rpartition("/")[0] or None
    if path not in {found.path for found in connection.list_artifacts(run_id, folder)}:
        return b""
    with tempfile.TemporaryDirectory() as scratch:
        return Path(connection.download_artifacts(run_id, path, scratch)).read_bytes()
