"""A fold's numbers and pictures to its MLflow run, its model to the registry, as a stage.

python -m pipelines.register --dataset pascal --source data/VOC2012 --folds 0
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import provenance, run_metrics, storage
from pipelines.conditions import Conditions
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.drawn import DrawnTest, DrawnTraining
from pipelines.model_card import CARD, model_card
from pipelines.results import FoldResult
from pipelines.run_pages import OUTCOMES, REPORT, FoldPage, of_model
from pipelines.tracking import Tracker
from pipelines.tracking_registry import NewVersion, Registry, version_page
from pipelines.train import TrainedFold

CODE_VERSION = 4
"""Raise it when the same fold would be recorded in another way."""
PANELS = ("best", "median")
"""Ranks of pictures that are no failures."""


def stage(
    config: CrossValidationConfig,
    data: str,
    drawn: tuple[Stage, Stage],
    trained: Stage,
    evaluated: Stage,
    fold: int,
    run_id: str,
    job: str,
) -> Stage:
    """Record and register a fold of a job; `data` is the source's fingerprint, `drawn` what it trains and tests on."""
    place = [config.tracking_uri, config.experiment, config.model_name]
    key = fingerprint("register", CODE_VERSION, evaluated.key, job, *place)
    return Stage(
        name=f"register fold {fold}",
        result=storage.join(config.store, "registrations", f"{config.dataset}-fold{fold}-{key}.json"),
        run=register_fold,
        arguments=(config, data, run_id, evaluated.folder),
        needs=(*drawn, trained, evaluated),
        complete=SameRun("run_id", run_id),
    )


@dataclass(frozen=True)
class SameRun:
    """A result counts only for the run that it was logged to: a new tracker gets everything anew."""

    field: str
    run_id: str
    """Empty in a dry run, which starts none."""

    def __call__(self, result: Mapping[str, Any]) -> bool:
        return not self.run_id or bool(result[self.field] == self.run_id)


def register_fold(
    config: CrossValidationConfig,
    data: str,
    run_id: str,
    pictures: str,
    training_result: Mapping[str, Any],
    test_result: Mapping[str, Any],
    trained_result: Mapping[str, Any],
    evaluated_result: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Log the fold, register its weights, move the fold's alias if they are better under the same protocol."""
    training, test = DrawnTraining.from_json(training_result), DrawnTest.from_json(test_result)
    trained = TrainedFold.from_json(trained_result)
    result = FoldResult.from_json(evaluated_result)
    tracker = Tracker(config.tracking_uri, config.experiment)
    # Of weights that an earlier job trained, or where the tracker was away.
    logged = tracker.logged_epochs(run_id)
    for record in trained.history:
        if record.epoch not in logged:
            tracker.log_epoch(run_id, record)
    result = dataclasses.replace(result, run_id=run_id, episodes_hash=test.episodes_hash)
    conditions = Conditions(protocol=result.protocol, episodes_hash=test.episodes_hash, data_fingerprint=data)
    page = FoldPage(config=config, result=result, conditions=conditions, links=_links(tracker, run_id))
    tracker.log_metrics(run_id, run_metrics.of_fold(result, page.paper))
    tracker.log_params(run_id, {"drawn": {**_params(training), **_params(test)}})
    tracker.log_dataset(run_id, f"{config.data_title} fold {result.fold}", test.episodes_hash, "test", config.source)
    tags = provenance.protocol_tags(conditions.protocol, test.episodes_hash)
    tracker.set_tags(run_id, tags)
    _log_pictures(tracker, run_id, pictures, result)
    if result.outcomes:
        tracker.log_bytes(run_id, storage.read_bytes(storage.join(config.store, result.outcomes)), OUTCOMES)
    tracker.log_bytes(run_id, conditions.to_text().encode(), "protocol.json")
    card = model_card(page, training)
    tracker.log_bytes(run_id, card.encode(), CARD)
    version = _registered(page, tracker, run_id, tags, card)
    page = _with_version(page, version)
    tracker.describe(run_id, page.of_run())
    tracker.log_bytes(run_id, page.result.to_text().encode(), "fold.json")
    tracker.finish(run_id)
    return page.result.to_json()


def _links(tracker: Tracker, run_id: str) -> dict[str, str]:
    links = {"run": tracker.page(run_id), "model card": tracker.page(run_id, CARD)}
    if parent := tracker.parent(run_id):
        links |= {"cross-validation": tracker.page(parent), "report": tracker.page(parent, REPORT)}
    return links


def _with_version(page: FoldPage, version: str) -> FoldPage:
    name = page.config.model_name
    links = {f"{name} version {version}": version_page(name, version), **page.links}
    del links["run"]  # it is this run's page
    return dataclasses.replace(page, result=dataclasses.replace(page.result, model_version=version), links=links)


def _log_pictures(tracker: Tracker, run_id: str, pictures: str, result: FoldResult) -> None:
    """By kind, in folders of their own."""
    by_folder = {"charts": [result.curve_picture, result.bars_picture], "panels": [], "failures": [], "energy": []}
    for panel in result.panels:
        by_folder["panels" if panel.rank in PANELS else "failures"].append(panel.picture)
        if panel.energy:
            by_folder["energy"].append(panel.energy)
    with tempfile.TemporaryDirectory() as scratch:
        for folder, names in by_folder.items():
            for name in names:
                picture = storage.read_bytes(storage.join(pictures, name))
                file = Path(scratch, folder, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(picture)
        tracker.log_file(run_id, scratch, "pictures")


def _params(drawn: DrawnTraining | DrawnTest) -> dict[str, Any]:
    places = ("fold", "folder", "store", "left_out")
    return {name: value for name, value in drawn.to_json().items() if name not in places}


def _registered(page: FoldPage, tracker: Tracker, run_id: str, tags: Mapping[str, str], card: str) -> str:
    from mshnet.checkpoint import WEIGHTS_FILE, read_config

    config, result = page.config, page.result
    registry = Registry(tracker, config.model_name, of_model(config))
    interval = result.score.miou_interval
    ends = {"miou_low": f"{interval.low:.4f}", "miou_high": f"{interval.high:.4f}"} if interval else {}
    version = NewVersion(
        fold=result.fold,
        miou=result.score.miou,
        conditions=page.conditions,
        description=page.of_version(),
        card=card,
        tags={
            **ends,
            "protocol": tags["protocol"],
            "selection": config.selection,
            "network": config.model.label,
            "git_commit": result.git_commit,
        },
    )
    model = storage.join(config.store, result.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, WEIGHTS_FILE)
        weights.write_bytes(storage.read_bytes(storage.join(model, WEIGHTS_FILE)))
        number = registry.register(run_id, weights, read_config(model), version)
    registry.promote(number, alias=f"fold{result.fold}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Register only: the job's stages up to the registry."""
    from pipelines.job import run_stages

    return run_stages(
        argv, "python -m pipelines.register", "Record and register the folds.", lambda graph: graph.registered
    )


if __name__ == "__main__":
    raise SystemExit(main())
