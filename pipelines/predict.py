#!/usr/bin/env python3
"""Segment all pictures of a folder or bucket, on one machine or a Ray cluster; started again, only what is missing.

python pipelines/predict.py --model models:/NAME@champion --learned scratch.safetensors --queries s3://B/in --out s3://B/out
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):
    # Run as a file: the folder that holds the packages goes where Python put this one.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import fingerprint
from pipelines.predict_part import LEARNED, MODEL, PartSettings, part_name, predict_part
from pipelines.predictions import (
    FORMAT_VERSION,
    INPUTS,
    MANIFEST,
    PARTS,
    SETTINGS,
    Query,
    by_parts,
    done_queries,
    finished,
)

LOG = logging.getLogger(__name__)
CODE_VERSION = 1
"""Raise it when the same inputs would give other masks."""
NAMED = 20
"""Of unreadable pictures, in the log; the tables name all."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What to segment, by what, and where the results go."""

    model: str
    """Folder or URI of a model, or a registered one: models:/NAME@champion, models:/NAME/3."""
    learned: tuple[str, ...]
    """Files of learnt classes (`mshnet learn`)."""
    queries: str
    """Folder or URI of the pictures; those of all folders below it."""
    out: str
    """Folder or URI for tables and masks; on a cluster of several machines one that all of them reach."""
    images_per_part: int = 64
    """Pictures that one task does; what a crash costs at most."""
    overlay: bool = False
    """Also a picture to look at for each query: the classes tinted and outlined."""
    threshold: float | None = None
    """Probability, 0..1, from which a pixel is an object's; without it each class's own (0.5 unless calibrated)."""
    tile_px: int = 0
    """Look at large pictures in overlapping windows of this many of their pixels; 0: as a whole."""
    overlap: float = 0.25
    """Share of a window that lies in the next one too, 0 or more and below 1."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; bfloat16 is for GPUs."""
    use_gpu: bool = False
    """A GPU for each task."""
    cpus_per_task: int = 1
    """CPU cores of a task."""
    tracking_uri: str = ""
    """Of MLflow, for a registered model; empty: what MLFLOW_TRACKING_URI names, else sqlite:///outputs/mlflow.db."""
    ray_address: str = ""
    """Of a running cluster; empty: the one that the environment names, else a local one."""
    any_versions: bool = False
    """On a cluster: also where nodes have other packages than requirements.lock or other code than this."""
    dry_run: bool = False
    """Say what is done and what would run, and stop."""

    def __post_init__(self) -> None:
        if not self.learned:
            raise InputError("expected files of learnt classes after --learned, got none; see mshnet learn --help")
        if self.images_per_part < 1 or self.cpus_per_task < 1:
            raise InputError(
                f"images_per_part and cpus_per_task must be 1 or more, got {self.images_per_part} and "
                f"{self.cpus_per_task}"
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"threshold must be 0..1, got {self.threshold}")
        if self.tile_px < 0 or not 0 <= self.overlap < 1:
            raise InputError(f"expected tile_px of 0 or more and overlap 0..1, got {self.tile_px} and {self.overlap}")


def resolved(given: Prediction) -> Prediction:
    """With local places made absolute: tasks have another working directory. Raises InputError where they overlap."""
    queries, out = storage.absolute(given.queries), storage.absolute(given.out)
    if queries == out:
        raise InputError(f"expected another place for results than the pictures' own, {out!r}; give another --out")
    learned = tuple(storage.absolute(file) for file in given.learned)
    return replace(given, queries=queries, out=out, learned=learned)


def predict(given: Prediction) -> Mapping[str, Any]:
    """All of it; the manifest. Raises InputError before anything expensive starts."""
    wanted = resolved(given)
    storage.check_readable(wanted.queries)
    with tempfile.TemporaryDirectory(prefix="mshnet-predict-") as scratch:
        inputs = _inputs(wanted, Path(scratch))
        queries = _listed(wanted)
        _check_others(wanted, inputs)
        parts = finished(wanted.out)
        missing = sorted(set(queries) - done_queries(parts))
        stages = _stages(wanted, inputs, by_parts(missing, wanted.images_per_part), len(parts))
        if wanted.dry_run:
            return _said(queries, missing, stages)
        storage.check_writable(wanted.out)
        _publish(wanted, inputs)
    if stages:
        LOG.info("%d of %d pictures to segment, in %d parts", len(missing), len(queries), len(stages))
        _execute(wanted, stages)
    return _sealed(wanted, inputs, queries)


# What goes in ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """Model and classes, as they were when the job was started: an alias may move meanwhile."""

    files: Mapping[str, bytes]
    """By path below OUT/inputs/KEY."""
    settings: Mapping[str, Any]
    """What the masks depend on, in words and hashes."""

    @property
    def key(self) -> str:
        return fingerprint(self.settings)

    @property
    def classes(self) -> list[str]:
        return [learned["name"] for learned in self.settings["classes"]]


def _inputs(wanted: Prediction, scratch: Path) -> _Inputs:
    """Fetched and checked against each other. Raises InputError for what is no model, no class, or of another size."""
    from mshnet import checkpoint, registries
    from mshnet.support_set import SupportSet

    folder = wanted.model
    if registries.is_address(folder):
        folder = str(registries.download(folder, scratch, wanted.tracking_uri))
    config = checkpoint.read_config(storage.absolute(folder))
    files = {}
    for name in (checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE):
        files[f"{MODEL}/{name}"] = storage.read_bytes(storage.join(storage.absolute(folder), name))
    classes: list[dict[str, Any]] = []
    for number, uri in enumerate(wanted.learned):
        support = SupportSet.load(uri)
        if support.image_size_px != config.get("image_size_px"):
            raise InputError(
                f"expected examples of {config.get('image_size_px')} px in {uri!r}, as the model's, found "
                f"{support.image_size_px} px; learn the class again with this model"
            )
        if support.name in [learned["name"] for learned in classes]:
            raise InputError(f"expected a name of its own for each class, found {support.name!r} twice")
        files[f"{LEARNED}/{number:03d}.safetensors"] = data = storage.read_bytes(uri)
        classes.append({"name": support.name, "supports": len(support), "sha256": hashlib.sha256(data).hexdigest()})
    weights = hashlib.sha256(files[f"{MODEL}/{checkpoint.WEIGHTS_FILE}"]).hexdigest()
    settings = {
        "model": {"sha256": weights, "config": config["model"], "image_size_px": config["image_size_px"]},
        "classes": classes,
        "threshold": wanted.threshold,
        "tile_px": wanted.tile_px,
        "overlap": wanted.overlap if wanted.tile_px else 0,
        "precision": wanted.precision,
        "overlay": wanted.overlay,
        "code_version": CODE_VERSION,
    }
    return _Inputs(files, settings)


def _listed(wanted: Prediction) -> list[Query]:
    """The pictures, sorted by path. Raises InputError where there is none."""
    from mshnet.data.filesystem import filesystem
    from mshnet.data.picture_files import ENDINGS, is_picture

    fs, root = filesystem(wanted.queries)
    base = root.rstrip("/") + "/"
    results = f"{wanted.out}/".removeprefix(f"{wanted.queries}/") if wanted.out.startswith(f"{wanted.queries}/") else ""
    found = []
    for place, info in fs.find(root, detail=True).items():
        path = place.removeprefix(base)
        if is_picture(path) and not (results and path.startswith(results)):
            version = str(info.get("ETag") or info.get("mtime") or info.get("LastModified") or "").strip('"')
            found.append(Query(path, int(info["size"]), version))
    if not found:
        raise InputError(f"no pictures under {wanted.queries!r} (looked for {', '.join(sorted(ENDINGS))})")
    return sorted(found)


def _check_others(wanted: Prediction, inputs: _Inputs) -> None:
    """Raise InputError where other masks lie in the place for the results."""
    recorded = storage.read_json(storage.join(wanted.out, SETTINGS))
    if recorded is None or recorded["key"] == inputs.key:
        return
    differing = [name for name, value in inputs.settings.items() if recorded["settings"].get(name) != value]
    raise InputError(
        f"expected no results in {wanted.out!r} yet, or those of the same model, classes and settings; found others "
        f"(other {', '.join(differing) or 'settings'}); give another --out"
    )


def _publish(wanted: Prediction, inputs: _Inputs) -> None:
    """Where every node finds them. The settings last: with them the place is taken."""
    for name, data in inputs.files.items():
        uri = storage.join(wanted.out, INPUTS, inputs.key, name)
        if storage.size_bytes(uri) != len(data):
            storage.write_bytes(uri, data)
    record = {"format": FORMAT_VERSION, "key": inputs.key, "settings": inputs.settings}
    if not storage.create_json(storage.join(wanted.out, SETTINGS), record):
        _check_others(wanted, inputs)


# What is done ------------------------------------------------------------------------------------------


def _stages(wanted: Prediction, inputs: _Inputs, parts: list[Sequence[Query]], first: int) -> list[Any]:
    from pipelines.dag import Stage

    settings = PartSettings(
        queries=wanted.queries,
        out=wanted.out,
        key=inputs.key,
        learned=len(wanted.learned),
        overlay=wanted.overlay,
        tile_px=wanted.tile_px,
        overlap=wanted.overlap,
        threshold=wanted.threshold,
        precision=wanted.precision,
        use_gpu=wanted.use_gpu,
    )
    stages = []
    for number, queries in enumerate(parts, start=first):
        name = part_name(number, queries)
        stages.append(
            Stage(
                name=f"predict {number - first + 1}/{len(parts)}",
                result=storage.join(wanted.out, PARTS, f"{name}.json"),
                run=predict_part,
                arguments=(settings, name, tuple(queries)),
                cpus=wanted.cpus_per_task,
                gpus=int(wanted.use_gpu),
                spread=True,
                images=len(queries),
            )
        )
    return stages


def _said(queries: list[Query], missing: list[Query], stages: list[Any]) -> Mapping[str, Any]:
    done = len(queries) - len(missing)
    print(f"done  {done} of {len(queries)} pictures", file=sys.stderr)
    for stage in stages:
        print(f"run   {stage.name}  ({stage.images} pictures)", file=sys.stderr)
    return {"done": done, "run": [stage.name for stage in stages], "unreadable": 0}


@contextmanager
def _joined(wanted: Prediction) -> Iterator[None]:
    from pipelines import capacity, environment
    from pipelines.cluster import NOTHING, connected, named

    cluster = named(wanted.ray_address)
    code = environment.identity(environment.lock()) if cluster and not wanted.any_versions else ""
    with connected(wanted.ray_address, {environment.VARIABLE: code} if cluster else NOTHING):
        if cluster:
            capacity.wait_or_refuse(capacity.found())
        yield


def _execute(wanted: Prediction, stages: list[Any]) -> None:
    from pipelines import dag

    with _joined(wanted):
        dag.execute(stages)


# What comes out ----------------------------------------------------------------------------------------


def _sealed(wanted: Prediction, inputs: _Inputs, queries: list[Query]) -> Mapping[str, Any]:
    """Write the manifest; in short what it says."""
    storage.remove_orphans(wanted.out)
    parts = finished(wanted.out)
    listed = set(queries)
    unreadable = {
        path: reason
        for part in parts
        for path, reason in part["unreadable"].items()
        if any(Query(*query) in listed for query in part["queries"] if query[0] == path)
    }
    manifest = {
        "format": FORMAT_VERSION,
        "key": inputs.key,
        "settings": inputs.settings,
        "queries": wanted.queries,
        "classes": {name: number for number, name in enumerate(inputs.classes, start=1)},
        "pictures": len(queries),
        "unreadable": unreadable,
        "parts": [{name: part[name] for name in ("name", "sha256", "size_bytes", "rows")} for part in parts],
    }
    uri = storage.join(wanted.out, MANIFEST)
    storage.write_json(uri, manifest)
    for path, reason in list(unreadable.items())[:NAMED]:
        LOG.warning("%s: %s", path, reason)
    if len(unreadable) > NAMED:
        LOG.warning("and %d more; %s names them all", len(unreadable) - NAMED, uri)
    return {"predictions": uri, "pictures": len(queries), "parts": len(parts), "unreadable": len(unreadable)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 failed, or done but for pictures that cannot be read; 2 usage."""
    prog = "predict.py"
    given = tyro.cli(Prediction, args=argv, prog=prog, description=DESCRIPTION)
    from pipelines import job

    unreadable = 0

    def results() -> Mapping[str, Any]:
        nonlocal unreadable
        found = predict(given)
        unreadable = found["unreadable"]
        return found

    return job.report(results, prog) or int(unreadable > 0)


DESCRIPTION = "Segment all pictures of a folder or bucket by learnt classes; started again, only what is missing."


if __name__ == "__main__":
    raise SystemExit(main())
