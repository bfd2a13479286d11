"""Registered models for the method, which knows no registry: the plugin for addresses `models:/...`.

`mshnet.predict` finds it by the entry point `models` of the group `mshnet.registries`.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mshnet.data.filesystem import filesystem, is_local
from mshnet.errors import InputError
from pipelines.tracking import Tracker
from pipelines.tracking_client import client, quiet, quotable
from pipelines.tracking_registry import Registry
from pipelines.tracking_server import check
from pipelines.tracking_uri import absolute, sqlite_file

MODEL = "artifacts/model"
"""The model folder within what `served_model` stores."""
EXPERIMENT = "mshnet-given-weights"
"""Of the runs under which weights are registered that no run of ours trained."""
_ADDRESS = re.compile(r"models:/(?P<name>[^/:]+?)(?:@(?P<alias>[^/@:]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class _Address:
    name: str
    alias: str
    version: str


def download(address: str, folder: Path, tracking_uri: str) -> Path:
    """The model folder (weights, config.json) of a registered version, fetched below `folder`.

    `address` is `models:/NAME@ALIAS` or `models:/NAME/VERSION`; `tracking_uri` is MLflow's, empty for what
    MLFLOW_TRACKING_URI names, else sqlite:///outputs/mlflow.db. Raises InputError, naming what there is, where no
    such version is registered, and for one that is no model of this project.
    """
    wanted = _parsed(address)
    uri = absolute(tracking_uri)
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        raise InputError(
            f"expected MLflow's database at {str(file)!r} to look for {address}, found none; give --tracking-uri, or "
            "set MLFLOW_TRACKING_URI"
        )
    check(uri)
    version = _version(client(uri), wanted, uri)
    return _fetched(version, folder, uri, address)


def register(folder: str | Path, name: str, tracking_uri: str, description: str) -> str:
    """Number of the version of the registered model `name` with the weights of a model folder (path or URI).

    For weights that no run of this project trained: it has no score, so no alias moves to it. The same weights give
    the same version. `description` is Markdown. Raises InputError for a folder that holds no model.
    """
    from mshnet.checkpoint import read_config

    config = read_config(str(folder))
    tracker = Tracker(tracking_uri, EXPERIMENT)
    check(tracker.tracking_uri)
    with tempfile.TemporaryDirectory() as scratch:
        weights = _local_weights(str(folder), Path(scratch))
        with weights.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        if known := _known(client(tracker.tracking_uri), name, sha256):
            return known
        return _registered(Registry(tracker, name, description), weights, config, sha256)


def _local_weights(folder: str, scratch: Path) -> Path:
    from mshnet.checkpoint import WEIGHTS_FILE

    fs, path = filesystem(posixpath.join(folder, WEIGHTS_FILE))
    if not fs.isfile(path):
        raise InputError(f"no weights to register at {posixpath.join(folder, WEIGHTS_FILE)!r}")
    if is_local(folder):
        return Path(path)
    fs.get_file(path, str(scratch / WEIGHTS_FILE))
    return scratch / WEIGHTS_FILE


def _registered(registry: Registry, weights: Path, config: Mapping[str, Any], sha256: str) -> str:
    tracker, name = registry.tracker, registry.model_name
    tags = {"origin": str(config.get("origin", "given weights")), "weights_sha256": sha256}
    key = f"{name} {sha256}"
    run_id = tracker.start_parent(f"{name}: given weights", {"model": config["model"]}, tags, key)
    tracker.describe(run_id, registry.description)
    tags |= {"fold": "none", "run_id": run_id}
    version = registry.add(run_id, weights, config, tags, registry.description, registry.description)
    tracker.finish(run_id)
    return version


def _known(mlflow: Any, name: str, sha256: str) -> str:
    """The ready version with these weights; "" where there is none."""
    for version in mlflow.search_model_versions(f"name = '{quotable(name)}'"):
        if version.tags.get("weights_sha256") == sha256 and version.status == "READY":
            return str(version.version)
    return ""


def _parsed(address: str) -> _Address:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise InputError(f"expected models:/NAME@ALIAS or models:/NAME/VERSION, got {address!r}")
    return _Address(match["name"], match["alias"] or "", match["version"] or "")


def _version(mlflow: Any, wanted: _Address, uri: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        if wanted.alias:
            return mlflow.get_model_version_by_alias(wanted.name, wanted.alias)
        return mlflow.get_model_version(wanted.name, wanted.version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise InputError(
                f"no answer from the model registry at {uri} ({error}); is the server there, and the address its?"
            ) from error
        raise InputError(f"{_missing(mlflow, wanted)} at {uri}; {_there(mlflow, wanted.name)}") from error


def _missing(mlflow: Any, wanted: _Address) -> str:
    what = f"alias {wanted.alias!r}" if wanted.alias else f"version {wanted.version}"
    return f"expected {what} of the registered model {wanted.name!r}, found none"


def _there(mlflow: Any, name: str) -> str:
    """What could have been meant, in words."""
    models = {model.name: model for model in mlflow.search_registered_models()}
    if name not in models:
        return f"registered models there: {', '.join(sorted(models)) or 'none'}"
    versions = sorted(int(v.version) for v in mlflow.search_model_versions(f"name = '{quotable(name)}'"))
    aliases = ", ".join(sorted(models[name].aliases)) or "none"
    return f"its versions: {', '.join(map(str, versions)) or 'none'}; its aliases: {aliases}"


@contextmanager
def _no_bar() -> Iterator[None]:
    # MLflow draws one into log files too.
    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _fetched(version: Any, folder: Path, uri: str, address: str) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    from mshnet.checkpoint import CONFIG_FILE

    folder.mkdir(parents=True, exist_ok=True)
    source = f"{version.source.rstrip('/')}/{MODEL}"
    try:
        with quiet("mlflow"), _no_bar():
            fetched = Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=uri))
    except (MlflowException, OSError) as error:
        raise InputError(
            f"cannot fetch {address} from {source} ({error}); is its artifact store within reach?"
        ) from error
    if not (fetched / CONFIG_FILE).is_file():
        raise InputError(f"expected a model of this project as {address}, found another (no {CONFIG_FILE} in {source})")
    return fetched
