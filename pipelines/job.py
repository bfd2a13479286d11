"""Running the graph or a part of it: what every command of this package shares."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from mshnet.data.own import OwnData
from mshnet.errors import InputError
from pipelines import (
    capacity,
    dag,
    environment,
    given,
    nodes,
    provenance,
    scan,
    stopping,
    storage,
    tracking_server,
    tracking_uri,
    train,
)
from pipelines.capacity import room
from pipelines.cluster import NOTHING, connected, named
from pipelines.config import ComputeConfig, CrossValidationConfig, JobArguments, parse
from pipelines.dag import Stage
from pipelines.graph import Graph, Runs, build, job_key
from pipelines.scan import Scan
from pipelines.tracking import Tracker
from pipelines.turns import turn

LOG = logging.getLogger(__name__)
Wanted = Callable[[Graph], Sequence[Stage]]


def run_stages(
    argv: Sequence[str] | None,
    prog: str,
    description: str,
    wanted: Wanted,
    show: Callable[[Any], None] | None = None,
) -> int:
    """Parse, check, run what is missing of the wanted stages, and print the results as one JSON line.

    `show` tells a person about the results, on stderr. Returns the exit code: 0 done, 1 failed. Usage errors
    exit with 2.
    """
    return run_parsed(parse(JobArguments, argv, prog, description), prog, wanted, show)


def run_parsed(arguments: JobArguments, prog: str, wanted: Wanted, show: Callable[[Any], None] | None = None) -> int:
    """The same from arguments."""

    def results() -> Any:
        found = run(resolved(arguments.cross_validation), arguments.dry_run, wanted)
        if show and not arguments.dry_run:
            show(found[0])
        return found[0] if len(found) == 1 else found

    return report(results, prog)


def report(results: Callable[[], Any], prog: str) -> int:
    """Print what a command found as one JSON line, or what went wrong in words; gives the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    storage.silence()
    try:
        with stopping.orderly():
            found = results()
    except (InputError, dag.StageFailedError, OSError) as error:  # OSError: a disk or an object store that went away
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: stopped; the same command goes on", file=sys.stderr)
        return 130  # as a shell says it: 128 + SIGINT
    except stopping.Stopped:
        print(f"{prog}: stopped; the same command goes on", file=sys.stderr)
        return stopping.EXIT_CODE
    sys.stderr.flush()
    print(json.dumps(found, allow_nan=False), flush=True)
    return 0


def resolved(config: CrossValidationConfig) -> CrossValidationConfig:
    """The configuration with local places made absolute: workers have another working directory."""
    weights = config.backbone_weights
    own = _resolved_own(config)
    # The reader says what one's own data needs.
    source = "" if config.is_own and not config.source else storage.absolute(config.source)
    return replace(
        given.resolved(config),
        own=own,
        source=own.images or source,
        store=storage.absolute(config.store),
        split_lists=config.split_lists and storage.absolute(config.split_lists),
        backbone_weights=weights if weights in ("imagenet", "random", "") else storage.absolute(weights),
        tracking_uri=tracking_uri.absolute(config.tracking_uri),
    )


def _resolved_own(config: CrossValidationConfig) -> OwnData:
    def absolute(place: str) -> str:
        return place and storage.absolute(place)

    own = config.own
    return replace(
        own,
        images=absolute(own.images),
        annotations=absolute(own.annotations),
        masks=absolute(own.masks),
        class_list=absolute(own.class_list),
        classes=absolute(own.classes),
    )


def run(config: CrossValidationConfig, dry_run: bool, wanted: Wanted) -> list[Any]:
    """Everything between parsing and printing. Raises InputError before anything expensive starts."""
    given.check(config)
    scan.check(config)
    if config.split_lists:
        storage.check_readable(config.split_lists)
    makes_weights = (train.train_fold, given.take_over)
    trains = any(stage.run in makes_weights for stage in _upstream(wanted(build(config, scan.UNKNOWN, ""))))
    weights = weights_id(config) if trains else ""
    if not dry_run:
        storage.check_writable(config.store)  # last, as it makes the folder
    with joined(config, looks=not dry_run, trains=trains):
        LOG.info("scanning %s", config.source)
        scanned = scan.scan(config, record=not dry_run)
        targets = with_data_report(wanted) if trains else wanted
        planned = dag.plan(targets(build(config, scanned, weights)))
        if dry_run:
            print("\n".join(planned.lines()), file=sys.stderr)
            return [{"done": list(planned.done), "run": [stage.name for stage in planned.pending]}]
        if not trains:
            return _results(dag.execute(wanted(build(config, scanned, weights))))
        at_once = room(config.compute, capacity.found()) if planned.pending else 1  # before runs that nobody would end
        # Or two that begin at the same moment would have runs of their own each.
        with turn(f"runs of {config.store}", "MLflow runs") if named(config.compute.ray_address) else nullcontext():
            runs = start_runs(config, scanned, weights)
        graph = build(config, scanned, weights, runs, at_once)
        results = _tracked(config, runs, lambda: dag.execute(targets(graph)))
        return results[: len(wanted(graph))]


def with_data_report(wanted: Wanted) -> Wanted:
    """The same and, last, the data report of one's own data, where anything at all is to do."""

    def targets(graph: Graph) -> Sequence[Stage]:
        stages = wanted(graph)
        if graph.surveyed is None or not dag.plan(stages).pending:
            return stages
        return [*stages, graph.surveyed]

    return targets


@contextmanager
def joined(config: CrossValidationConfig, looks: bool = True, trains: bool = True) -> Iterator[None]:
    """`connected`, and on a cluster a look at every node before anything expensive. Raises InputError."""
    compute = config.compute
    if looks and trains:
        tracking_server.check(config.tracking_uri)
    cluster = named(compute.ray_address)
    with connected(compute.ray_address, _environment(compute) if cluster else NOTHING):
        if cluster:
            capacity.wait_or_refuse(capacity.found())
        if cluster and looks:
            nodes.check(config, trains)
        yield


def _environment(compute: ComputeConfig) -> dict[str, str]:
    """What the job's processes on other nodes cannot find out by themselves."""
    code = "" if compute.any_versions else environment.identity(environment.lock())
    return {environment.VARIABLE: code, provenance.COMMIT_VARIABLE: provenance.git_commit()}


def _results(results: dict[str, dag.Result]) -> list[Any]:
    return [dict(result) for result in results.values()]


def _tracked(config: CrossValidationConfig, runs: Runs, execute: Callable[[], dict[str, dag.Result]]) -> list[Any]:
    """Execute, and tell the tracker how it went."""
    statuses = dict.fromkeys((runs.parent, *runs.folds), "FAILED")
    try:
        results = execute()
        statuses = dict.fromkeys(statuses, "FINISHED")
        return _results(results)
    except (dag.StageFailedError, dag.StageInputError) as error:
        for fold, run_id in zip(config.folds, runs.folds, strict=True):
            failed = any(stage.endswith(f"fold {fold}") for stage in error.stages)
            statuses[run_id] = "FAILED" if failed else "FINISHED"
        raise
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        statuses = dict.fromkeys(statuses, "KILLED")
        raise
    finally:
        finish_runs(config, statuses)


def weights_id(config: CrossValidationConfig) -> str:
    """What identifies the backbone's weights, after checking that they can be loaded.

    Raises InputError for weights that are absent or of another architecture.
    """
    if config.trained:
        return given.weights_id(config)  # each folder has its own backbone
    if config.backbone_weights == "random":
        return "random"  # there is nothing to check, so torch need not be imported
    from mshnet.backbone import Backbone
    from mshnet.checkpoint import load_backbone_weights

    load_backbone_weights(Backbone(config.model.backbone), config.backbone_weights)
    if config.backbone_weights == "imagenet":
        return config.backbone_weights
    return hashlib.sha256(storage.read_bytes(config.backbone_weights)).hexdigest()[:12]


def start_runs(config: CrossValidationConfig, scanned: Scan, weights: str) -> Runs:
    """The parent run and one child per fold; the same job submitted again gets the same ones."""
    tracker = Tracker(config.tracking_uri, config.experiment)
    key = job_key(config, build(config, scanned, weights).evaluated)
    tags = provenance.tags(config, scanned, weights)
    name = f"{config.data_title} {config.shot}-shot {config.model.label}"
    parent = tracker.start_parent(name, config.to_json(), tags, key)
    tracker.log_bytes(parent, config.to_text().encode(), "config.json")
    children = tuple(
        tracker.start_child(
            parent, f"fold {fold}", {**config.to_json(), "fold": fold}, {**tags, "fold": str(fold)}, f"{key}-{fold}"
        )
        for fold in config.folds
    )
    return Runs(parent, children)


def finish_runs(config: CrossValidationConfig, statuses: Mapping[str, str]) -> None:
    """Tell the tracker how runs ended; one that is away only gets a warning."""
    tracker = Tracker(config.tracking_uri, config.experiment)
    for run_id, status in statuses.items():
        try:
            tracker.finish(run_id, status)
        except Exception as error:  # noqa: BLE001 - a tracker that is away must not hide what happened
            LOG.warning("the tracker did not take that run %s is %s: %s", run_id, status, error)


def _upstream(targets: Sequence[Stage]) -> list[Stage]:
    found: dict[str, Stage] = {}
    waiting = list(targets)
    while waiting:
        stage = waiting.pop()
        if stage.name not in found:
            found[stage.name] = stage
            waiting += stage.needs
    return list(found.values())
