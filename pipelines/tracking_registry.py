"""The model registry: versions that tell where they come from, aliases that move to better ones.

A model is stored by `served_model`, without any pickle.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mshnet.errors import InputError
from pipelines.conditions import Conditions
from pipelines.model_card import CARD
from pipelines.tracking import Tracker, cut
from pipelines.tracking_client import client, quiet, quotable

LOG = logging.getLogger(__name__)
CONDITIONS_TAG = "conditions"
LONGEST_DESCRIPTION = 5000  # characters, in MLflow's database


@dataclass(frozen=True, kw_only=True)
class NewVersion:
    """What a version says of itself."""

    fold: int
    miou: float
    """By which `promote` compares; NaN where there is no score."""
    conditions: Conditions
    """Of `miou`."""
    description: str
    """Markdown."""
    tags: Mapping[str, str]
    """Beside those that the fields above give."""
    card: str = ""
    """The model card, Markdown; it lies beside the model."""


@dataclass(frozen=True)
class Registry:
    """One registered model."""

    tracker: Tracker
    model_name: str
    description: str = ""
    """Markdown; written where the model is made or has none."""

    def register(self, run_id: str, weights_path: str | Path, config: Mapping[str, Any], version: NewVersion) -> str:
        """Number of the version with these weights; the same run and weights give the same version.

        `config` is the content of the config.json that `mshnet.checkpoint.load_model` reads beside the
        weights (a safetensors file, backbone included).
        """
        weights = Path(weights_path)
        if not weights.is_file():
            raise InputError(f"no weights to register at {weights}")
        with weights.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        same_run = f"name = '{quotable(self.model_name)}' and run_id = '{quotable(run_id)}'"
        for known in self._client().search_model_versions(same_run):
            if known.tags.get("weights_sha256") == sha256 and known.status == "READY":
                return str(known.version)
        tags = {  # in the order in which the list of versions shows them
            "fold": str(version.fold),
            "miou": repr(float(version.miou)),
            **version.tags,
            "episodes_hash": version.conditions.episodes_hash,
            "data_fingerprint": version.conditions.data_fingerprint,
            "run_id": run_id,
            "weights_sha256": sha256,
            CONDITIONS_TAG: version.conditions.to_text(),
        }
        return self.add(run_id, weights, config, tags, version.description, version.card)

    def add(
        self,
        run_id: str,
        weights: Path,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        description: str,
        card: str = "",
    ) -> str:
        """Number of a new version, logged to a run; one of the tags says the fold. The model is made if need be."""
        mlflow = self._client()
        self._make(mlflow)
        model = self._log_model(mlflow, run_id, weights, config, dict(tags), card)
        with quiet("mlflow"):
            made = mlflow.create_model_version(
                self.model_name,
                model.artifact_location,  # "models:/ID" would be looked up at MLflow's global tracking URI
                run_id,
                tags=dict(tags),
                description=cut(description, LONGEST_DESCRIPTION),
                model_id=model.model_id,
            )
        return str(made.version)

    def promote(self, version: str, alias: str) -> bool:
        """Point `alias` at `version` if that is an improvement; True where the alias points there afterwards.

        It moves where no version has it, or where that version was scored under the same conditions and lower.
        A holder scored under others is not comparable: it stays, and the log says what differs.
        """
        mlflow, name = self._client(), self.model_name
        held = mlflow.get_registered_model(name).aliases.get(alias)
        if str(held) == str(version):
            return True
        candidate = mlflow.get_model_version(name, str(version)).tags
        score = float(candidate["miou"])
        if math.isnan(score):
            LOG.warning("%s version %s has no score: alias %r does not move to it", name, version, alias)
            return False
        if held is not None:
            holder = mlflow.get_model_version(name, str(held)).tags
            if found := differing(candidate, holder):
                LOG.warning(
                    "%s: alias %r stays at version %s: version %s was scored under other conditions, which cannot be "
                    "compared (%s). Set the alias by hand if the new one is to be served.",
                    name, alias, held, version, found,
                )  # fmt: skip
                return False
            held_score = float(holder.get("miou", "nan"))
            if score <= held_score:
                LOG.info(
                    "%s: alias %r stays at version %s (mIoU %.4f; version %s has %.4f)",
                    name, alias, held, held_score, version, score,
                )  # fmt: skip
                return False
        mlflow.set_registered_model_alias(name, alias, str(version))
        return True

    def _client(self) -> Any:
        return client(self.tracker.tracking_uri)

    def _make(self, mlflow: Any) -> None:
        from mlflow.exceptions import MlflowException

        description = cut(self.description, LONGEST_DESCRIPTION)
        try:
            mlflow.create_registered_model(self.model_name, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Somebody may have written a better one by hand.
            if not mlflow.get_registered_model(self.model_name).description:
                mlflow.update_registered_model(self.model_name, description)

    def _log_model(
        self, mlflow: Any, run_id: str, weights: Path, config: Mapping[str, Any], tags: dict[str, str], card: str
    ) -> Any:
        """The MLflow logged model: served_model.py, the weights, config.json, our own package and the model card."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        from pipelines import served_model

        experiment_id = mlflow.get_run(run_id).info.experiment_id
        name = re.sub("[/:.%\"']", "_", f"{self.model_name} fold {tags['fold']}")  # what MLflow takes here
        model = mlflow.create_logged_model(experiment_id, name, run_id, tags, model_type="few-shot-segmentation")
        try:
            with tempfile.TemporaryDirectory() as scratch:
                local = Path(scratch, "logged")
                identity = Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id)
                with quiet("mlflow"):
                    served_model.save(local, weights, config, identity)
                if card:
                    (local / CARD).write_text(card, encoding="utf-8")
                mlflow.log_model_artifacts(model.model_id, str(local))
            mlflow.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        except BaseException:
            mlflow.finalize_logged_model(model.model_id, "FAILED")
            raise
        return mlflow.finalize_logged_model(model.model_id, "READY")


def version_page(model_name: str, version: str) -> str:
    """Address of a version's page within MLflow's UI."""
    return f"#/models/{quote(model_name, safe='')}/versions/{version}"


def differing(candidate: Mapping[str, str], holder: Mapping[str, str]) -> str:
    """What keeps two versions' scores from being compared, by their tags, in words; "" where nothing does."""
    if CONDITIONS_TAG not in holder:
        return "the version that has it does not say under which"
    try:
        there = Conditions.from_json(holder[CONDITIONS_TAG])
    except InputError:
        return "those of the version that has it were written by another release"
    return "; ".join(Conditions.from_json(candidate[CONDITIONS_TAG]).differences(there))
