"""The experiment tracker and the model registry: with served_model, the only module that knows MLflow.

Everything goes through `MlflowClient` with explicit run ids, never through the fluent API, whose "current
run" is one per process; so any number of processes and threads can log at once. A `Tracker` holds two
strings and can be sent to any worker.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mshnet.errors import InputError
from pipelines.results import EpochRecord
from pipelines.tracking_uri import absolute, artifact_location, sqlite_file

LOG = logging.getLogger(__name__)

KEY_TAG = "mshnet.key"
RESUBMITTED_TAG = "mshnet.resubmitted_with"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # without it the UI lists no training runs
LONGEST_PARAM = 500  # what the oldest servers in use accept
PER_BATCH = 100  # params in one log_batch request, MLflow's limit
STATUSES = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class Tracker:
    """One experiment on one tracking server (or SQLite file)."""

    tracking_uri: str
    """sqlite:///FILE, an http(s) address, or a database URI such as postgresql+psycopg2://..."""
    experiment: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracking_uri", absolute(self.tracking_uri))
        if not self.experiment.strip():
            raise InputError("the experiment needs a name, got an empty one")

    # Runs -----------------------------------------------------------------------------------------------

    def start_parent(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], resume_key: str) -> str:
        """Run id of the cross-validation's run; the one started before under the same key is reopened."""
        return self._start(name, params, dict(tags), resume_key)

    def start_child(
        self,
        parent_run_id: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        resume_key: str,
    ) -> str:
        """Run id of a run below `parent_run_id`; one started before under the same key is reopened."""
        return self._start(name, params, {**tags, "mlflow.parentRunId": parent_run_id}, resume_key)

    def log_epoch(self, run_id: str, record: EpochRecord) -> None:
        """One epoch's curve points, at step = epoch."""
        values = {
            "train/loss": record.loss,
            "train/outer_loss": record.outer_loss,
            "train/inner_loss": record.inner_loss,
            "train/learning_rate": record.learning_rate,
            "train/episodes_per_s": record.episodes_per_s,
        }
        if record.validation_miou is not None:
            values["validation/miou"] = record.validation_miou
        self.log_metrics(run_id, values, record.epoch)

    def logged_epochs(self, run_id: str) -> set[int]:
        """Epochs that `log_epoch` has logged to the run."""
        return {point.step for point in self._client().get_metric_history(run_id, "train/loss")}

    def log_metrics(self, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step; "/" in a name groups the charts."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_name(key), float(value), now, step) for key, value in values.items()]
        self._client().log_batch(run_id, metrics=metrics, synchronous=True)

    def log_params(self, run_id: str, config: Mapping[str, Any]) -> None:
        """A (nested) config as params `a.b.c`; a param once logged stays, another value becomes a tag."""
        from mlflow.entities import Param

        client = self._client()
        known: dict[str, str] = client.get_run(run_id).data.params
        wanted = flattened(config)
        new = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(new), PER_BATCH):
            client.log_batch(run_id, params=new[start : start + PER_BATCH], synchronous=True)
        changed = {key: value for key, value in wanted.items() if known.get(key, value) != value}
        if changed:  # MLflow's params are written once; a resubmission on other hardware must not fail on that
            client.set_tag(run_id, RESUBMITTED_TAG, json.dumps(changed))

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Tags, written over where they exist."""
        from mlflow.entities import RunTag

        self._client().log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_file(self, run_id: str, local_path: str | Path, artifact_folder: str = "") -> None:
        """A local file (or a folder's content) as an artifact under `artifact_folder`."""
        path = Path(local_path)
        if not path.exists():
            raise InputError(f"no file to log at {path}")
        log = self._client().log_artifacts if path.is_dir() else self._client().log_artifact
        log(run_id, str(path), artifact_folder or None)

    def log_bytes(self, run_id: str, data: bytes, artifact_path: str) -> None:
        """Bytes as the artifact `folder/name`."""
        folder, _, name = artifact_path.rpartition("/")
        if not name or ".." in artifact_path.split("/"):
            raise InputError(f"expected an artifact path that ends in a file name and goes down, got {artifact_path!r}")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, name)
            path.write_bytes(data)
            self.log_file(run_id, path, folder)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run: FINISHED, FAILED or KILLED."""
        if status not in STATUSES:
            raise InputError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
        with redirect_stdout(sys.stderr):  # on a server MLflow prints links, and stdout is for results
            self._client().set_terminated(run_id, status)

    # Registry -------------------------------------------------------------------------------------------

    def register(
        self,
        model_name: str,
        run_id: str,
        weights_path: str | Path,
        config: Mapping[str, Any],
        score: float,
        protocol: str,
        fold: int,
        description: str,
        data_fingerprint: str = "",
    ) -> str:
        """The version of `model_name` with these weights; the same run and weights give the same version.

        `config` is the content of the config.json that `mshnet.checkpoint.load_model` reads beside the
        weights (a safetensors file, backbone included). The model is logged without any pickle.
        """
        from mlflow.exceptions import MlflowException

        weights = Path(weights_path)
        if not weights.is_file():
            raise InputError(f"no weights to register at {weights}")
        client = self._client()
        with weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        same_run = f"name = '{_quotable(model_name)}' and run_id = '{_quotable(run_id)}'"
        for version in client.search_model_versions(same_run):
            if version.tags.get("weights_sha256") == sha256 and version.status == "READY":
                return str(version.version)
        try:
            client.create_registered_model(model_name, description="MSHNet, one version per trained fold.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {
            "fold": str(fold),
            "protocol": protocol,
            "miou": repr(float(score)),
            "run_id": run_id,
            "weights_sha256": sha256,
            "data_fingerprint": data_fingerprint,
        }
        model = self._log_model(run_id, weights, config, tags)
        with _quiet("mlflow"):
            version = client.create_model_version(
                model_name,
                model.artifact_location,  # "models:/ID" would be looked up at MLflow's global tracking URI
                run_id,
                tags=tags,
                description=description,
                model_id=model.model_id,
            )
        return str(version.version)

    def promote(self, model_name: str, version: str, protocol: str, score: float, alias: str = "champion") -> bool:
        """Point `alias` at `version` if that is an improvement; True where the alias points there afterwards.

        It moves where no version has it, or where that version was scored by the same protocol and lower.
        A holder scored by another protocol is not comparable: it stays, and the log says so.
        """
        client = self._client()
        holder_version = client.get_registered_model(model_name).aliases.get(alias)
        if str(holder_version) == str(version):
            return True
        if math.isnan(score):
            LOG.warning("%s version %s has no score: alias %r does not move to it", model_name, version, alias)
            return False
        if holder_version is not None:
            holder = client.get_model_version(model_name, str(holder_version))
            held_protocol, held_score = holder.tags.get("protocol"), float(holder.tags.get("miou", "nan"))
            if held_protocol != protocol:
                LOG.warning(
                    "%s: alias %r stays at version %s: it was scored as %r, version %s as %r, which cannot "
                    "be compared. Set the alias by hand if the new one is to be served.",
                    model_name, alias, holder_version, held_protocol, version, protocol,
                )  # fmt: skip
                return False
            if score <= held_score:
                LOG.info(
                    "%s: alias %r stays at version %s (mIoU %.4f; version %s has %.4f)",
                    model_name, alias, holder_version, held_score, version, score,
                )  # fmt: skip
                return False
        client.set_registered_model_alias(model_name, alias, str(version))
        return True

    # Inside ---------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        from mlflow import MlflowClient

        _migrate_sqlite(self.tracking_uri)
        return MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)

    def _experiment_id(self) -> str:
        """Id of the experiment, made where it is missing; any number of processes may do this at once."""
        from mlflow.exceptions import MlflowException

        client = self._client()
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                made = client.create_experiment(
                    self.experiment, artifact_location(self.tracking_uri), tags=EXPERIMENT_TAGS
                )
                return str(made)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self.experiment)
        if found.lifecycle_stage != "active":
            raise InputError(
                f"the MLflow experiment {self.experiment!r} was deleted: restore it "
                f"(`mlflow experiments restore --experiment-id {found.experiment_id}`) or choose another name"
            )
        return str(found.experiment_id)

    def _start(self, name: str, params: Mapping[str, Any], tags: dict[str, str], resume_key: str) -> str:
        client, experiment_id = self._client(), self._experiment_id()
        tags = _context_tags() | tags | {KEY_TAG: resume_key}
        query = f"tags.`{KEY_TAG}` = '{_quotable(resume_key)}'"
        if parent := tags.get("mlflow.parentRunId"):
            query += f" and tags.`mlflow.parentRunId` = '{_quotable(parent)}'"
        found = client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"])
        if found:
            run_id = str(found[0].info.run_id)
            client.update_run(run_id, status="RUNNING", name=name)
            # What made the numbers that are there stays; another commit is noted beside it.
            known = found[0].data.tags
            self.set_tags(run_id, {key: value for key, value in tags.items() if key not in known})
            if known.get("git_commit") != tags.get("git_commit"):
                self.set_tags(run_id, {"mshnet.resubmitted_commit": tags.get("git_commit", "unknown")})
        else:
            run_id = str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
        self.log_params(run_id, params)
        return run_id

    def _log_model(self, run_id: str, weights: Path, config: Mapping[str, Any], tags: dict[str, str]) -> Any:
        """The MLflow logged model: served_model.py, the weights, config.json and our own package."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        from pipelines import served_model

        client = self._client()
        experiment_id = client.get_run(run_id).info.experiment_id
        model = client.create_logged_model(experiment_id, "model", run_id, tags, model_type="few-shot-segmentation")
        try:
            with tempfile.TemporaryDirectory() as scratch:
                local = Path(scratch, "logged")
                identity = Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id)
                with _quiet("mlflow"):
                    served_model.save(local, weights, config, identity)
                client.log_model_artifacts(model.model_id, str(local))
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        except BaseException:
            client.finalize_logged_model(model.model_id, "FAILED")
            raise
        return client.finalize_logged_model(model.model_id, "READY")


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`: keys that MLflow accepts, values cut at 500 characters."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[_name(f"{prefix}{key}")] = text if len(text) <= LONGEST_PARAM else text[: LONGEST_PARAM - 1] + "…"
    return flat


def _name(key: str) -> str:
    """`key` in the characters that MLflow takes for metrics and params, and a path that leads nowhere else."""
    parts = re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)


def _quotable(text: str) -> str:
    if "'" in text or "`" in text:
        raise InputError(f"expected a name without quotes, got {text!r}")
    return text


def _context_tags() -> dict[str, str]:
    """Who and what started the run, as MLflow's own run table shows it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        user = "unknown"
    return {
        "mlflow.user": user,
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "LOCAL",
    }


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
        _quiet("alembic"),
        _quiet("mlflow.store.db.utils"),
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        MlflowClient(tracking_uri=tracking_uri)


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """That logger's information messages off, warnings on."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
