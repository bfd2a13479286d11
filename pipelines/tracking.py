"""The experiment tracker's runs. (Models are in `tracking_registry`.)

Everything goes through `MlflowClient` with explicit run ids, never through the fluent API, whose "current
run" is one per process; so any number of processes and threads can log at once. A `Tracker` holds two
strings and can be sent to any worker.
"""

from __future__ import annotations

import getpass
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mshnet.errors import InputError
from pipelines.results import EpochRecord
from pipelines.tracking_client import client, quotable
from pipelines.tracking_uri import absolute, artifact_location
from pipelines.tracking_views import PAGE_TAG, experiment_tags

KEY_TAG = "mshnet.key"
RESUBMITTED_TAG = "mshnet.resubmitted_with"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # without it the UI lists no training runs
LONGEST_PARAM = 500  # what the oldest servers in use accept
LONGEST_TAG = 5000  # likewise
PARENT_TAG, NOTE_TAG = "mlflow.parentRunId", "mlflow.note.content"
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
        return self._start(name, params, {**tags, PARENT_TAG: parent_run_id}, resume_key)

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

    def describe(self, run_id: str, markdown: str) -> None:
        """What the run's page shows as its description."""
        self.set_tags(run_id, {NOTE_TAG: cut(markdown, LONGEST_TAG)})

    def log_dataset(self, run_id: str, name: str, digest: str, context: str, source: str) -> None:
        """What a run worked on, for the column "Dataset" and for filters such as `dataset.digest = '...'`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest, source_type="local", source=json.dumps({"uri": source}))
        tags = [InputTag("mlflow.data.context", context)]
        self._client().log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])

    def page(self, run_id: str, artifact: str = "") -> str:
        """Address of the run's page, or of an artifact on it, within MLflow's UI."""
        place = f"#/experiments/{self._client().get_run(run_id).info.experiment_id}/runs/{run_id}"
        return f"{place}/artifacts/{artifact}" if artifact else place

    def parent(self, run_id: str) -> str:
        """Id of the run above it; "" where there is none."""
        return str(self._client().get_run(run_id).data.tags.get(PARENT_TAG, ""))

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

    def _client(self) -> Any:
        return client(self.tracking_uri)

    def _experiment_id(self) -> str:
        """Id of the experiment, made where it is missing; any number of processes may do this at once."""
        from mlflow.exceptions import MlflowException

        client = self._client()
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                client.create_experiment(self.experiment, artifact_location(self.tracking_uri), tags=EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(self.experiment)
        if found.lifecycle_stage != "active":
            raise InputError(
                f"the MLflow experiment {self.experiment!r} was deleted: restore it "
                f"(`mlflow experiments restore --experiment-id {found.experiment_id}`) or choose another name"
            )
        if PAGE_TAG not in found.tags:  # once, so that what a person changes or deletes stays so
            for key, value in experiment_tags(found.experiment_id).items():
                if key not in found.tags:
                    client.set_experiment_tag(found.experiment_id, key, value)
        return str(found.experiment_id)

    def _start(self, name: str, params: Mapping[str, Any], tags: dict[str, str], resume_key: str) -> str:
        client, experiment_id = self._client(), self._experiment_id()
        tags = _context_tags() | tags | {KEY_TAG: resume_key}
        query = f"tags.`{KEY_TAG}` = '{quotable(resume_key)}'"
        if parent := tags.get(PARENT_TAG):
            query += f" and tags.`{PARENT_TAG}` = '{quotable(parent)}'"
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


def cut(text: str, longest: int) -> str:
    """The text; where it is longer, its whole lines that fit, and a line that says so."""
    if len(text) <= longest:
        return text
    note = "\n\n(cut: too long for the tracker)"
    return text[: longest - len(note)].rpartition("\n")[0] + note


def _name(key: str) -> str:
    """`key` in the characters that MLflow takes for metrics and params, and a path that leads nowhere else."""
    parts = re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)


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
