"""Cross-validate on real VOC and COCO images at a size that a CPU can bear, and print the tables.

    python benchmarks/real_images.py --data DIR --out DIR

DATA holds VOC2012 and COCO2014 in their usual layouts, each with its list files in splits_hsnet/, and
weights/resnet50_partly_trained_fp16.safetensors. Results: docs/benchmarks/real_images.md.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

REPOSITORY = Path(__file__).resolve().parents[1]
SETTINGS = "--image-size-px 113 --precision bfloat16 --episodes-per-epoch 400 --schedule cosine --selection last"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to run, on what."""

    data: Path
    """Folder with VOC2012, COCO2014 and weights."""
    out: Path
    """Folder for stores, tracker and reports."""
    only: Literal["both", "voc", "coco"] = "both"
    """One data set alone."""


def command(arguments: Arguments, dataset: str) -> list[str]:
    """The job's command line for a data set."""
    folder, epochs, more = {
        "voc": ("VOC2012", 8, "--dataset pascal"),
        "coco": ("COCO2014", 4, "--dataset coco --folds 0 --skip-small-classes"),
    }[dataset]
    source = arguments.data / folder
    return [
        sys.executable, str(REPOSITORY / "pipelines" / "cross_validate.py"), "--recipe", "paper",
        *shlex.split(more), "--source", str(source), "--split-lists", str(source / "splits_hsnet"),
        "--backbone-weights", str(arguments.data / "weights" / "resnet50_partly_trained_fp16.safetensors"),
        *shlex.split(SETTINGS), "--epochs", str(epochs), "--store", str(arguments.out / "store"),
        "--tracking-uri", f"sqlite:///{arguments.out.resolve()}/mlflow.db",
    ]  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """mIoU in % per fold, and the means."""
    rows = (
        ("MSHNet, trained", "miou"),
        ("same network, untrained", "untrained_miou"),
        ("everything is foreground", "foreground_miou"),
        ("cosine to the prototype, threshold from base classes", "prototype_miou"),
    )
    folds = result["folds"]
    lines = ["| | " + " | ".join(f"fold {fold['fold']}" for fold in folds) + " | mean |"]
    lines.append("| --- |" + " ---: |" * (len(folds) + 1))
    for label, key in rows:
        values = [100 * fold[key] for fold in folds]
        cells = [f"{value:.1f}" for value in [*values, sum(values) / len(values)]]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for, one after the other."""
    arguments = tyro.cli(Arguments)
    for dataset in ("voc", "coco") if arguments.only == "both" else (arguments.only,):
        line = command(arguments, dataset)
        print(shlex.join(line), flush=True)
        started = time.monotonic()
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        print(
            f"\n{table(result)}\n\n{(time.monotonic() - started) / 60:.0f} min; report {result['report']}\n", flush=True
        )


if __name__ == "__main__":
    main()
