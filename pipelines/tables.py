"""The paper's tables 2, 3 and 4, filled from the experiment tracker: a page, Markdown, and all cells as JSON.

python -m pipelines.report tables --tracking-uri sqlite:///outputs/mlflow.db --experiment mshnet --out tables
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mshnet.command_line import run
from mshnet.errors import InputError
from pipelines import chosen_runs, table_rows, tracking_search, tracking_uri
from pipelines.cells import TABLES
from pipelines.chosen_runs import Apart, Asked, mean_miou
from pipelines.table_rows import Filled
from pipelines.tracking_search import TrackedRun


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables asked for, and what the experiment holds beside them."""

    tracking_uri: str
    experiment: str
    filled: tuple[Filled, ...]
    other: tuple[Apart, ...]
    """Runs that no table has a place for."""

    def to_json(self) -> dict[str, Any]:
        """Every cell with the run that it was read from, and every run that fills none with the reason."""
        return {
            "tracking_uri": self.tracking_uri,
            "experiment": self.experiment,
            "tables": [_table_json(filled) for filled in self.filled],
            "other_runs": [_apart_json(apart) for apart in self.other],
        }


def read(uri: str, experiment: str, numbers: Sequence[int], asked: Asked) -> Tables:
    """The tables from an experiment. Raises InputError for a table or an experiment that is not there."""
    wrong = [number for number in numbers if number not in TABLES]
    if wrong or not numbers:
        raise InputError(f"tables must be of {', '.join(map(str, TABLES))} and at least one, got {tuple(numbers)}")
    chosen_runs.check(asked)
    runs = tracking_search.cross_validations(uri, experiment)
    filled = tuple(table_rows.fill(TABLES[number], runs, asked) for number in dict.fromkeys(numbers))
    return Tables(
        tracking_uri=tracking_uri.absolute(uri), experiment=experiment, filled=filled, other=_other(filled, runs)
    )


def _other(filled: Sequence[Filled], runs: Sequence[TrackedRun]) -> tuple[Apart, ...]:
    def why(found: TrackedRun) -> str:
        key = chosen_runs.Key.of(found)
        return f"no place in these tables: {found.params['dataset']}, {key.similarity}, {key.shot}-shot"

    return tuple(
        Apart(found, why(found)) for found in runs if not any(chosen_runs.fits(table.table, found) for table in filled)
    )


def _table_json(filled: Filled) -> dict[str, Any]:
    cells = [
        {
            "backbone": block.backbone,
            "kind": row.kind,
            "method": row.label,
            "architecture": row.architecture,
            "similarity": row.similarity,
            **number.to_json(),
            "difference": number.difference,
            "inside": number.inside,
        }
        for block in filled.blocks
        for row in block.rows
        for number in row.numbers
    ]
    parameters = [
        {
            "backbone": block.backbone,
            "method": row.label,
            "counted": row.parameters,
            "paper": row.paper_parameters,
            "same": f"{row.parameters / 1e6:.1f}M" == row.paper_parameters if row.paper_parameters else None,
        }
        for block in filled.blocks
        for row in block.rows
        if row.parameters is not None
    ]
    return {
        "table": filled.table.number,
        "title": filled.table.title,
        "measured": dict(filled.chosen.measured),
        "differs_from_the_paper": [
            {"name": name, "here": here, "paper": paper} for name, here, paper in filled.differs
        ],
        "cells": cells,
        "parameters": parameters,
        "runs": [source.to_json() for source in table_rows.behind(filled.chosen)],
        "apart": [_apart_json(apart) for apart in filled.chosen.apart],
    }


def _apart_json(apart: Apart) -> dict[str, Any]:
    found = apart.run
    return {
        "run_id": found.run_id,
        "name": found.name,
        "status": found.status,
        "miou": mean_miou(found),
        "why": apart.why,
    }


def write(made: Tables, out: str | Path) -> dict[str, Path]:
    """`tables.html`, `tables.md` and `tables.json` in the folder `out`; their paths by ending."""
    from pipelines import tables_page

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "html": tables_page.html(made),
        "md": tables_page.markdown(made),
        "json": json.dumps(made.to_json(), indent=1, allow_nan=False) + "\n",
    }
    for ending, text in texts.items():
        (folder / f"tables.{ending}").write_text(text, encoding="utf-8")
    return {ending: folder / f"tables.{ending}" for ending in texts}


def tables(
    out: str,
    tracking_uri: str = "",
    experiment: str = "mshnet",
    numbers: Annotated[tuple[int, ...], tyro.conf.arg(name="tables")] = (2, 3, 4),
    runs: Annotated[Asked, tyro.conf.arg(name="")] = Asked(),  # noqa: B008 - frozen
) -> None:
    """Fill the paper's tables 2, 3 and 4 from the tracker: the page tables.html, tables.md, tables.json.

    Runs in one table were all measured in one way: of the ways that the flags leave, the one that fills most cells.

    Args:
        out: Folder for the three files.
        tracking_uri: MLflow: an SQLite file or a server's address; empty: what MLFLOW_TRACKING_URI names, else
            sqlite:///outputs/mlflow.db.
        experiment: MLflow experiment.
        numbers: Which tables, of 2 3 4.
        runs: Which runs may fill them.
    """
    paths = write(read(tracking_uri, experiment, numbers, runs), out)
    print(json.dumps({ending: str(path) for ending, path in paths.items()}))


if __name__ == "__main__":
    run(tables, "python -m pipelines.tables")
