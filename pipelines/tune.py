#!/usr/bin/env python3
"""Search for training values: learning rate, weight decay, inner weight, batch, schedule.

python pipelines/tune.py --dataset pascal --source data/VOC2012 --folds 0 --epochs 30 --trials 20
"""

from __future__ import annotations

import json
import posixpath
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    # Run as a file: the folder that holds the packages goes where Python put this one.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mshnet.errors import InputError
from pipelines import capacity, dag, provenance, scan, search, storage
from pipelines.capacity import room
from pipelines.cluster import named
from pipelines.config import CrossValidationConfig, JobArguments, fingerprint, parse
from pipelines.graph import Graph, build
from pipelines.job import joined, report, resolved, weights_id
from pipelines.journal import Journal
from pipelines.search import SearchConfig
from pipelines.turns import turn

if TYPE_CHECKING:
    from pipelines.search_runs import SearchRuns

DESCRIPTION = (
    "Search for training values with Ray Tune, scored on held-out base classes (never on the test fold's), and write "
    "them as a recipe for cross_validate.py --config. The same command goes on with a search that was interrupted."
)


@dataclass(frozen=True, kw_only=True)
class TuneArguments(JobArguments):
    """What the search takes: the configuration to start from, and what is tried."""

    out: str = ""
    """Where the recipe is written; empty: searches/DATASET-KEY/recipe.json on the store."""
    search: SearchConfig = field(default_factory=SearchConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Search; the last line on stdout is the result as JSON, the table of trials goes to stderr."""
    arguments = _parsed(list(sys.argv[1:] if argv is None else argv))
    try:
        search.check(arguments.cross_validation, arguments.search)
    except InputError as error:
        print(f"tune.py: {error}", file=sys.stderr)
        return 2
    return report(lambda: run(arguments), "tune.py")


def _parsed(argv: list[str]) -> TuneArguments:
    """With --selection base for a default, whatever the recipe does with its own best epoch."""
    if any(flag.split("=")[0] == "--config" for flag in argv):
        return parse(TuneArguments, argv, "tune.py", DESCRIPTION)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump({"validation": {"selection": "base"}}, file)
        file.flush()
        # As a file and not as a flag, so that --help shows it.
        arguments = parse(TuneArguments, ["--config", file.name, *argv], "tune.py", DESCRIPTION)
    return replace(arguments, config="")


def run(arguments: TuneArguments) -> dict[str, Any]:
    """Everything between parsing and printing. Raises InputError before anything expensive starts."""
    config, dry_run = resolved(arguments.cross_validation), arguments.dry_run
    out = arguments.out and storage.absolute(arguments.out)
    scan.check(config)
    if config.split_lists:
        storage.check_readable(config.split_lists)
    weights = weights_id(config)
    if not dry_run:
        for place in (config.store, posixpath.dirname(out)):
            if place:
                storage.check_writable(place)
    if out and storage.exists(out) and storage.size_bytes(out) is None:
        raise InputError(f"expected a file's name in --out, found the folder {out!r}; give {out}/recipe.json")
    with joined(config, looks=not dry_run):
        scanned = scan.scan(config, record=not dry_run)
        graph = build(config, scanned, weights)
        key = search_key(arguments.search, graph)
        folder = storage.join(config.store, "searches", f"{config.dataset}-{key}")
        if dry_run:
            return _planned(Journal(config, arguments.search, folder))
        tags = provenance.tags(config, scanned, weights)
        at_once = room(config.compute, capacity.found())
        with turn(folder, "the search") if named(config.compute.ray_address) else nullcontext():
            journal = Journal(config, arguments.search, folder)  # as the one before left it
            return _searched(journal, graph, key, tags, at_once, out)


def search_key(tried: SearchConfig, graph: Graph) -> str:
    """What makes two submissions the same search. With more trials it is still the same: the first ones are kept."""
    course = {name: value for name, value in tried.to_json().items() if name not in ("trials", "concurrency")}
    return fingerprint("search", search.CODE_VERSION, [stage.key for stage in graph.trained], course)


def _planned(journal: Journal) -> dict[str, Any]:
    print(search.table(journal.records.values(), journal.longest), file=sys.stderr)
    pending = journal.pending()
    return {"done": [number for number in journal.records if number not in pending], "run": pending}


def _searched(
    journal: Journal, graph: Graph, key: str, tags: Mapping[str, str], at_once: int, out: str
) -> dict[str, Any]:
    from pipelines.drawn import DrawnTraining
    from pipelines.search_runs import SearchRuns

    drawn = [DrawnTraining.from_json(result) for result in dag.execute(graph.drawn_training).values()]
    runs = SearchRuns.start(journal.config, journal.search, key, tags)
    status = "FAILED"
    try:
        for record in journal.untold():
            if runs.end(record, journal.longest):
                journal.told(record.number)
        if journal.pending():
            from pipelines import trials

            folds = {fold.fold: fold for fold in drawn}
            trials.run(trials.Trials(journal.config, folds, journal, runs), journal.search.concurrency or at_once)
        journal.clean_up()
        result = _result(journal, runs, out)
        status = "FINISHED"
        return result
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        status = "KILLED"
        raise
    finally:
        runs.finish(status, [n for n, record in journal.records.items() if record.status == "running"])


def _result(journal: Journal, runs: SearchRuns, out: str) -> dict[str, Any]:
    """Write the recipe and the result; give the result. Raises StageFailedError where there is none to give."""
    records = list(journal.records.values())
    table = search.table(records, journal.longest)
    print(f"\n{table}\n", file=sys.stderr)
    chosen, start = search.best(records), records[0]
    failed = [record for record in records if record.status == "failed"]
    if chosen is None or start in failed:
        errors = "\n".join(f"  trial {record.number}: {record.error}" for record in failed)
        what = "the start could not be scored" if start in failed else "no trial came to its end"
        raise dag.StageFailedError(f"{what}; submit the same search again to go on:\n{errors}", ["search"])
    recipe = out or storage.join(journal.folder, "recipe.json")
    storage.write_json(recipe, search.recipe(journal.config, chosen.values))
    print(_announced(recipe, journal.config), file=sys.stderr)
    result = {
        "best": chosen.values.to_json(),
        "best_trial": chosen.number,
        "score": chosen.score,
        "start_score": start.score if start.status == "complete" else None,
        "trials": {status: sum(record.status == status for record in records) for status in search.STATUSES},
        "recipe": recipe,
        "run_id": runs.parent,
    }
    storage.write_json(storage.join(journal.folder, "result.json"), result)
    runs.log_result(result, storage.read_bytes(recipe), table)
    return result


def _announced(recipe: str, config: CrossValidationConfig) -> str:
    """What a person has to know of a recipe."""
    flags = " ".join(["--config", recipe, *search.left_to_the_taker(config)])
    return (
        f"recipe   {recipe} (the method and its training; its {config.training.epochs} epochs are the search's)\n"
        f"next     python pipelines/cross_validate.py {flags} (and --source, --store, ... as for any job)\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
