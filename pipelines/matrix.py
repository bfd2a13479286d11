"""All cells of the paper's tables as one job: what is missing runs, what cells share runs once.

python -m pipelines.matrix --tables 2 3 4 --pascal-source data/VOC2012 --coco-source data/COCO2014 --recipe paper
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from mshnet.errors import InputError
from pipelines import capacity, dag, job, nodes, scan, storage, tracking_search
from pipelines.capacity import room
from pipelines.cells import Cell, cells
from pipelines.cluster import named
from pipelines.config import CrossValidationConfig, JobArguments, parse
from pipelines.fold_table import percent
from pipelines.graph import Graph, Runs, build
from pipelines.merging import Part, merge
from pipelines.scan import Scan
from pipelines.turns import turn

LOG = logging.getLogger(__name__)
PROG = "python -m pipelines.matrix"
DESCRIPTION = (
    "Cross-validate every cell of the paper's tables that is not done yet, as one job. The same command goes on with "
    "one that was interrupted. Each cell takes the job's flags, and its own data set, backbone, similarity and shot."
)
OF_THE_CELLS = {
    "--dataset": "--tables or --datasets",
    "--backbone": "--backbones",
    "--similarity": "--similarities",
    "--shot": "--shots",
}
"""Flags of the job that differ by cell, and what is to be given instead."""
BACKBONE = "{backbone}"


@dataclass(frozen=True, kw_only=True)
class MatrixArguments(JobArguments):
    """What the matrix takes beside a configuration."""

    tables: tuple[int, ...] = (2, 3, 4)
    """The paper's tables whose cells are wanted: 2 and 4 are Pascal-5i, 3 is COCO-20i."""
    datasets: tuple[str, ...] = ()
    """Data sets instead of the tables' own."""
    backbones: tuple[str, ...] = ()
    """Backbones instead of the tables' resnet50 and resnet101."""
    shots: tuple[int, ...] = ()
    """Numbers of supports instead of the tables' 1 and 5."""
    similarities: tuple[str, ...] = ()
    """Similarities instead of the tables' own."""
    pascal_source: str = ""
    """Folder or URI of VOC2012; empty: the recipe's place."""
    coco_source: str = ""
    """Folder or URI of COCO2014; empty: the recipe's place."""


Wanted = Mapping[Cell, CrossValidationConfig]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells; the last line on stdout has each as JSON, the table goes to stderr. 1 where any failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(MatrixArguments, argv, PROG, DESCRIPTION)
    try:
        wanted = configurations(arguments, argv)
    except InputError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    ended: list[dict[str, Any]] = []

    def results() -> Any:
        if arguments.dry_run:
            return _planned(wanted)
        ended.extend(run(wanted))
        print(f"\n{summary(ended)}\n", file=sys.stderr)
        return {"cells": ended}

    return job.report(results, PROG) or int(any(cell["status"] == "failed" for cell in ended))


def configurations(arguments: MatrixArguments, argv: Sequence[str]) -> dict[Cell, CrossValidationConfig]:
    """The configuration of every cell, from the flags that all share. Raises InputError for flags that cannot be."""
    for flag, instead in OF_THE_CELLS.items():
        if any(given == flag or given.startswith(f"{flag}=") for given in argv):
            raise InputError(f"{flag} differs from cell to cell; give {instead}")
    if arguments.cross_validation.trained:
        raise InputError(
            "--trained is of one cell; give it to cross_validate.py, and python -m pipelines.tables shows it"
        )
    # Of another network there is one kind.
    one_kind = arguments.cross_validation.model.architecture != "mshnet"
    similarities = ("both",) if one_kind else arguments.similarities
    chosen = cells(arguments.tables, arguments.datasets, arguments.backbones, arguments.shots, similarities)
    datasets = list(dict.fromkeys(cell.dataset for cell in chosen))
    if len(datasets) > 1 and any(given == "--source" or given.startswith("--source=") for given in argv):
        raise InputError(f"--source is one place for {' and '.join(datasets)}; give --pascal-source and --coco-source")
    # A recipe has other defaults for another data set.
    base = {
        dataset: parse(MatrixArguments, ["--dataset", dataset, *argv], PROG, DESCRIPTION).cross_validation
        for dataset in datasets
    }
    sources = {"pascal": arguments.pascal_source, "coco": arguments.coco_source}
    return {cell: job.resolved(_of(cell, base[cell.dataset], sources.get(cell.dataset, ""))) for cell in chosen}


def _of(cell: Cell, config: CrossValidationConfig, source: str) -> CrossValidationConfig:
    model: dict[str, Any] = {"backbone": cell.backbone, "similarity": cell.similarity}
    return replace(
        config,
        source=source or config.source,
        shot=cell.shot,
        model=replace(config.model, **model),
        backbone_weights=config.backbone_weights.replace(BACKBONE, cell.backbone),
    )


@dataclass(frozen=True)
class _Inputs:
    """What cells are built on: each source is scanned once, each backbone's weights are looked at once."""

    wanted: Wanted
    scans: Mapping[str, Scan]
    """By source."""
    weights: Mapping[tuple[str, str], str]
    """By backbone and where its weights come from."""

    def build(self, cell: Cell, runs: Runs = Runs()) -> Graph:  # noqa: B008 - frozen
        """The cell's graph, without an order of its trainings: there are others'."""
        config = self.wanted[cell]
        return build(config, self.scan(cell), self.weights_of(cell), runs, side_by_side=len(config.folds))

    def scan(self, cell: Cell) -> Scan:
        """Of its source."""
        return self.scans[self.wanted[cell].source]

    def weights_of(self, cell: Cell) -> str:
        """What identifies its backbone's."""
        return self.weights[_weights_place(self.wanted[cell])]


def _weights_place(config: CrossValidationConfig) -> tuple[str, str]:
    return config.model.backbone, config.backbone_weights


def _checked(wanted: Wanted, dry_run: bool) -> dict[tuple[str, str], str]:
    """Everything that can be found out before anything expensive. Raises InputError."""
    for config in {config.source: config for config in wanted.values()}.values():
        scan.check(config)
        if config.split_lists:
            storage.check_readable(config.split_lists)
    distinct = {_weights_place(config): config for config in wanted.values()}
    weights = {place: job.weights_id(config) for place, config in distinct.items()}
    if not dry_run:
        storage.check_writable(_any(wanted).store)
    return weights


def _any(wanted: Wanted) -> CrossValidationConfig:
    return next(iter(wanted.values()))  # store, tracker and compute are the same for all


def _other_inputs(wanted: Wanted) -> list[CrossValidationConfig]:
    """One configuration for each source and file of weights that is not `_any`'s."""
    distinct: dict[tuple[str, str], CrossValidationConfig] = {}
    for config in wanted.values():
        distinct.setdefault((config.source, config.backbone_weights), config)
    return list(distinct.values())[1:]


def _scanned(wanted: Wanted, dry_run: bool) -> dict[str, Scan]:
    found = {}
    for source, config in {config.source: config for config in wanted.values()}.items():
        LOG.info("scanning %s", source)
        found[source] = scan.scan(config, record=not dry_run)
    return found


def _planned(wanted: Wanted) -> dict[str, Any]:
    """What a dry run shows: the cells, then the graph."""
    weights = _checked(wanted, dry_run=True)
    with job.joined(_any(wanted), looks=False):
        inputs = _Inputs(wanted, _scanned(wanted, dry_run=True), weights)
        done = _done(inputs)
        parts = merge({cell: inputs.build(cell) for cell in wanted}, at_once=1)
    missing = [part.reported for cell, part in parts.items() if cell not in done]
    planned = dag.plan(missing)
    pending = {stage.name for stage in planned.pending}
    width = max(len(cell.label) for cell in wanted)
    for cell, part in parts.items():
        to_do = sum(name in pending for name in part.names)
        state = "done" if cell in done else f"{to_do} of {len(part.names)} stages to run"
        print(f"cell  {cell.label:<{width}}  {state}", file=sys.stderr)
    print("\n".join(planned.lines()), file=sys.stderr)
    return {
        "cells": [{"cell": cell.label, "done": cell in done} for cell in wanted],
        "done": list(planned.done),
        "run": [stage.name for stage in planned.pending],
    }


def _done(inputs: _Inputs) -> dict[Cell, dag.Result]:
    """Summaries of the cells whose report is there, and whose run the tracker still has."""
    found: dict[Cell, dag.Result] = {}
    for cell, config in inputs.wanted.items():
        recorded = inputs.build(cell).reported.recorded()
        if recorded is not None and tracking_search.exists(config.tracking_uri, recorded["parent_run_id"]):
            found[cell] = recorded
    return found


def run(wanted: Wanted) -> list[dict[str, Any]]:
    """Run what is missing; how each cell ended. A cell that fails stops no other.

    Raises InputError before anything expensive starts.
    """
    config = _any(wanted)
    weights = _checked(wanted, dry_run=False)
    with job.joined(config):
        if named(config.compute.ray_address):
            for other in _other_inputs(wanted):
                nodes.check(other, trains=True)
        inputs = _Inputs(wanted, _scanned(wanted, dry_run=False), weights)
        done = _done(inputs)
        missing = [cell for cell in wanted if cell not in done]
        LOG.info("%d of %d cells are done", len(done), len(wanted))
        if not missing:
            return [_ended(cell, "was done", found=done[cell]) for cell in wanted]
        at_once = room(config.compute, capacity.found())  # before runs that nobody would end
        with turn(f"runs of {config.store}", "MLflow runs") if named(config.compute.ray_address) else nullcontext():
            runs = {cell: job.start_runs(wanted[cell], inputs.scan(cell), inputs.weights_of(cell)) for cell in missing}
        parts = merge({cell: inputs.build(cell, runs[cell]) for cell in missing}, at_once)
        outcome = _attempted(wanted, runs, parts)
    return [
        _ended(cell, "was done", found=done[cell]) if cell in done else _told(cell, parts[cell], outcome)
        for cell in wanted
    ]


def _attempted(wanted: Wanted, runs: Mapping[Cell, Runs], parts: Mapping[Cell, Part]) -> dag.Outcome:
    """Execute, and tell the tracker how each cell went."""
    well: dict[str, bool] = {}
    others = "FAILED"
    try:
        outcome = dag.attempt([part.reported for part in parts.values()], well.__setitem__)
        others = "FINISHED"  # they were done before
        return outcome
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        others = "KILLED"
        raise
    finally:
        status = {name: "FINISHED" if ended else "FAILED" for name, ended in well.items()}
        for cell, part in parts.items():
            last = zip((runs[cell].parent, *runs[cell].folds), (part.reported, *part.registered), strict=True)
            job.finish_runs(wanted[cell], {run_id: status.get(stage.name, others) for run_id, stage in last})


def _told(cell: Cell, part: Part, outcome: dag.Outcome) -> dict[str, Any]:
    found = outcome.results.get(part.reported.name)
    if found is not None:
        return _ended(cell, "done", found=found)
    causes = dag.causes({name: outcome.failures[name] for name in part.names if name in outcome.failures})
    error = "; ".join(f"{name}: {text}" for name, text in causes.items())
    return _ended(cell, "failed", error=error)


def _ended(cell: Cell, status: str, found: dag.Result | None = None, error: str = "") -> dict[str, Any]:
    told: dict[str, Any] = {"cell": cell.label, "status": status}
    if found:
        names = ("mean_miou", "mean_fb_iou", "parent_run_id", "report", "result", "registered_model")
        told |= {name: found[name] for name in names}
    return told | ({"error": error} if error else {})


def summary(ended: Sequence[Mapping[str, Any]]) -> str:
    """A line a cell: how it ended, mIoU and FB-IoU in %, or what went wrong."""
    width = max(len("cell"), *(len(cell["cell"]) for cell in ended))
    lines = [f"{'cell':<{width}}  {'status':<8}  mIoU, %  FB-IoU, %"]
    for cell in ended:
        numbers = [percent(100 * cell[name]) if name in cell else "–" for name in ("mean_miou", "mean_fb_iou")]
        lines.append(f"{cell['cell']:<{width}}  {cell['status']:<8}  {numbers[0]:>7}  {numbers[1]:>9}")
    lines += [f"{cell['cell']}: {cell['error']}" for cell in ended if "error" in cell]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
