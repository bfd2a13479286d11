"""`python -m mshnet learn`: a class from a few labelled examples, as one small file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from mshnet.commands.examples import Precision
from mshnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Learn:
    """Which class, from what, by which model."""

    model: str
    """Folder or URI of a model, or a registered one: models:/NAME@champion, models:/NAME/3."""
    name: str
    """Of the class."""
    support: Annotated[tuple[tuple[str, str], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="IMAGE MASK")]
    """A labelled example: its picture, and a mask of the same size in which what is not 0 is the object (mask.png, or
    one label of it: labels.png#3), a COCO JSON with the category's name (annotations.json#scratch), or polygons as
    JSON. Once for each of one or more examples."""
    out: str
    """The file to write, such as scratch.safetensors (path or URI)."""
    calibrate: bool = False
    """Choose the threshold that is best when each example is segmented by the others (two examples or more)."""
    overwrite: bool = False
    """Write over the file where it exists."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1."""
    precision: Precision = "float32"
    """Of the computation; bfloat16 is for GPUs."""
    tracking_uri: str = ""
    """Of MLflow, for a registered model; empty: what MLFLOW_TRACKING_URI names, else sqlite:///outputs/mlflow.db."""


def command(settings: Annotated[Learn, tyro.conf.arg(name="")]) -> None:
    """Learn a class from labelled examples and write it as one file, for `mshnet segment --learned FILE`.

    The file holds the examples at the model's size and the threshold, no code. The last line on stdout says as JSON
    what was written.
    """
    from mshnet.commands.examples import read_examples, refuse_existing
    from mshnet.predict import Segmenter

    if not settings.out.endswith(".safetensors"):
        raise InputError(f"expected a file name that ends with .safetensors for --out, got {settings.out!r}")
    refuse_existing(settings.out, settings.overwrite, "--out")
    images, masks = read_examples(settings.support)
    segmenter = Segmenter.open(
        settings.model, tracking_uri=settings.tracking_uri, device=settings.device, precision=settings.precision
    )
    learned = segmenter.learn(settings.name, images, masks, calibrate=settings.calibrate)
    learned.save(settings.out)
    print(
        json.dumps(
            {
                "out": settings.out,
                "name": learned.name,
                "examples": len(images),
                "threshold": learned.threshold,
                "object_shares": [round(float(mask.mean()), 4) for mask in masks],
                "image_size_px": segmenter.image_size_px,
                "model": learned.model,
            },
            ensure_ascii=False,
        ),
        flush=True,
    )
