"""The job as a graph of stages, and running it: what every command of this package shares."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mshnet.errors import InputError
from pipelines import aggregate, dag, draw, evaluate, preprocess, provenance, register, storage, train
from pipelines.config import CrossValidationConfig, JobArguments, fingerprint, parse
from pipelines.dag import Stage
from pipelines.preprocess import Scan
from pipelines.tracking import Tracker


@dataclass(frozen=True)
class Runs:
    """The job's MLflow runs. Empty in a dry run."""

    parent: str = ""
    folds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Every stage of a cross-validation, by kind, folds in the configuration's order."""

    sealed: Stage
    drawn_training: tuple[Stage, ...]
    drawn_test: tuple[Stage, ...]
    trained: tuple[Stage, ...]
    evaluated: tuple[Stage, ...]
    registered: tuple[Stage, ...]
    reported: Stage


def build(
    config: CrossValidationConfig, scanned: Scan, weights: str, runs: Runs = Runs(), side_by_side: int = 1
) -> Graph:
    """The graph; `weights` identifies the backbone's, `side_by_side` is how many folds train at once."""
    run_ids = runs.folds or ("",) * len(config.folds)
    sealed = preprocess.stages(config, scanned)
    training = tuple(draw.training_stage(config, scanned, sealed, fold) for fold in config.folds)
    test = tuple(draw.test_stage(config, scanned, sealed, fold) for fold in config.folds)
    trained: list[Stage] = []
    for fold, fold_drawn, run_id in zip(config.folds, training, run_ids, strict=True):
        # Without room for all at once, a fold waits for the one that has its place.
        earlier = (trained[-side_by_side],) if len(trained) >= side_by_side else ()
        trained.append(train.stage(config, weights, fold_drawn, fold, run_id, earlier))
    drawn = tuple(zip(training, test, strict=True))
    evaluated = tuple(
        evaluate.stage(config, d, t, fold) for fold, d, t in zip(config.folds, drawn, trained, strict=True)
    )
    registered = tuple(
        register.stage(config, scanned.fingerprint, d, t, e, fold, run_id)
        for fold, d, t, e, run_id in zip(config.folds, drawn, trained, evaluated, run_ids, strict=True)
    )
    reported = aggregate.stage(config, scanned, weights, evaluated, registered, runs.parent)
    return Graph(sealed, training, test, tuple(trained), evaluated, registered, reported)


def resolved(config: CrossValidationConfig) -> CrossValidationConfig:
    """The configuration with local places made absolute: workers have another working directory."""
    weights, tracking = config.backbone_weights, config.tracking_uri
    scheme, _, path = tracking.partition(":///")
    if scheme == "sqlite" and not path.startswith("/"):
        tracking = f"sqlite:///{os.path.abspath(path)}"
    return replace(
        config,
        source=storage.absolute(config.source),
        store=storage.absolute(config.store),
        split_lists=storage.absolute(config.split_lists),
        backbone_weights=weights if weights in ("imagenet", "random") else storage.absolute(weights),
        tracking_uri=tracking,
    )


def weights_id(config: CrossValidationConfig) -> str:
    """What identifies the backbone's weights, after checking that they can be loaded.

    Raises InputError for weights that are absent or of another architecture.
    """
    from mshnet.backbone import Backbone
    from mshnet.checkpoint import load_backbone_weights

    load_backbone_weights(Backbone(config.model.backbone), config.backbone_weights)
    if config.backbone_weights in ("imagenet", "random"):
        return config.backbone_weights
    return hashlib.sha256(storage.read_bytes(config.backbone_weights)).hexdigest()[:12]


def start_runs(config: CrossValidationConfig, scanned: Scan, weights: str) -> Runs:
    """The parent run and one child per fold; the same job submitted again gets the same ones."""
    tracker = Tracker(config.tracking_uri, config.experiment)
    dry = build(config, scanned, weights)
    key = fingerprint([stage.key for stage in dry.evaluated], config.model_name)
    tags = provenance.tags(config, scanned, weights)
    name = f"{config.dataset} {config.shot}-shot {config.model.backbone} {config.model.similarity}"
    parent = tracker.start_parent(name, config.to_json(), tags, key)
    tracker.log_bytes(parent, config.to_text().encode(), "config.json")
    children = tuple(
        tracker.start_child(
            parent, f"fold {fold}", {**config.to_json(), "fold": fold}, {**tags, "fold": str(fold)}, f"{key}-{fold}"
        )
        for fold in config.folds
    )
    return Runs(parent, children)


def run_stages(
    argv: Sequence[str] | None,
    prog: str,
    description: str,
    wanted: Callable[[Graph], Sequence[Stage]],
    show: Callable[[Any], None] | None = None,
) -> int:
    """Parse, check, run what is missing of the wanted stages, and print the results as one JSON line.

    `show` tells a person about the results, on stderr. Returns the exit code: 0 done, 1 failed. Usage errors
    exit with 2.
    """
    arguments = parse(JobArguments, argv, prog, description)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        results = run(resolved(arguments.cross_validation), arguments.dry_run, wanted)
    except (InputError, dag.StageFailedError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    if show and not arguments.dry_run:
        show(results[0])
    sys.stderr.flush()
    print(json.dumps(results[0] if len(results) == 1 else results, allow_nan=False), flush=True)
    return 0


def run(config: CrossValidationConfig, dry_run: bool, wanted: Callable[[Graph], Sequence[Stage]]) -> list[Any]:
    """Everything between parsing and printing. Raises InputError before anything expensive starts."""
    from pipelines.cluster import connected

    weights = weights_id(config)
    scanned = preprocess.scan(config)
    if dry_run:
        planned = dag.plan(wanted(build(config, scanned, weights)))
        print("\n".join(planned.lines()), file=sys.stderr)
        return [{"done": list(planned.done), "run": [stage.name for stage in planned.pending]}]
    needed = _upstream(wanted(build(config, scanned, weights)))
    tracked = any(stage.run in (train.train_fold, register.register_fold) for stage in needed)
    runs = start_runs(config, scanned, weights) if tracked else Runs()
    with connected(config.compute.ray_address) as resources:
        graph = build(config, scanned, weights, runs, _side_by_side(config, resources))
        try:
            results = dag.execute(wanted(graph))
        except BaseException:
            tracker = Tracker(config.tracking_uri, config.experiment)
            for run_id in (runs.parent, *runs.folds) if tracked else ():
                tracker.finish(run_id, "FAILED")
            raise
    return [dict(result) for result in results.values()]


def _upstream(targets: Sequence[Stage]) -> list[Stage]:
    found: dict[str, Stage] = {}
    waiting = list(targets)
    while waiting:
        stage = waiting.pop()
        if stage.name not in found:
            found[stage.name] = stage
            waiting += stage.needs
    return list(found.values())


def _side_by_side(config: CrossValidationConfig, resources: dict[str, float]) -> int:
    compute = config.compute
    cpus = compute.workers * compute.cpus_per_worker
    room = resources.get("CPU", 0) // cpus
    if compute.use_gpu:
        room = min(room, resources.get("GPU", 0) // compute.workers)
    if room < 1:
        raise InputError(
            f"expected room for {compute.workers} worker(s) of {compute.cpus_per_worker} CPU"
            f"{' and a GPU' if compute.use_gpu else ''} each, found {resources.get('CPU', 0):g} CPU and "
            f"{resources.get('GPU', 0):g} GPU in the cluster; lower --workers or --cpus-per-worker"
        )
    return int(room)
