#!/usr/bin/env python3
"""The job: a labelled data set in, a cross-validated and registered model out.

python pipelines/cross_validate.py --dataset pascal --source data/VOC2012 --backbone-weights imagenet
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a file: the folder that holds the packages goes where Python put this one.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipelines.job import run_stages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the whole graph; the last line on stdout is the result as JSON, the fold table goes to stderr."""
    return run_stages(
        argv,
        "cross_validate.py",
        "Cross-validate a few-shot model on a labelled data set: preprocess, train, evaluate, register, report.",
        lambda graph: [graph.reported],
        show,
    )


def show(summary: Mapping[str, Any]) -> None:
    """The fold table, and where to look."""
    from pipelines import storage
    from pipelines.report import fold_table_text
    from pipelines.results import CrossValidation

    result = CrossValidation.from_json(storage.read_bytes(summary["result"]))
    tracking = result.artifacts["tracking"]
    pages = tracking if tracking.startswith("http") else f"mlflow ui --backend-store-uri {tracking}"
    versions = ", ".join(str(fold["model_version"]) for fold in summary["folds"])
    print(
        f"\n{fold_table_text(result)}\n\n"
        f"report   {summary['report']}\n"
        f"MLflow   {pages}\n"
        f"models   {summary['registered_model']}, versions {versions}\n",
        file=sys.stderr,
    )


if __name__ == "__main__":
    raise SystemExit(main())
