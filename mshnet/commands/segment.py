"""`python -m mshnet segment`: masks of one's own pictures, by labelled examples or learnt classes."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mshnet.commands.examples import Precision, read_examples
from mshnet.commands.queries import Query, find_queries
from mshnet.commands.results import MOST_CLASSES, Results
from mshnet.data.filesystem import is_local
from mshnet.data.picture_files import decoded, read_bytes
from mshnet.data.pictures import rgb, upright
from mshnet.errors import InputError
from mshnet.progress import bar

if TYPE_CHECKING:
    from mshnet.predict import Segmented, Segmenter
    from mshnet.support_set import SupportSet


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What to segment, by what, and where the masks go."""

    model: str
    """Folder or URI of a model, or a registered one: models:/NAME@champion, models:/NAME/3."""
    query: tuple[str, ...]
    """Pictures to segment: files, and folders (with all below them)."""
    out: str
    """Folder for the masks: NAME.png for each picture, at its own size, 255 on the object. Of several classes their
    numbers instead, which classes.json names."""
    support: Annotated[tuple[tuple[str, str], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="IMAGE MASK")] = ()
    """A labelled example: its picture, and a mask of the same size in which what is not 0 is the object (mask.png, or
    one label of it: labels.png#3), a COCO JSON with the category's name (annotations.json#scratch), or polygons as
    JSON. Once for each example."""
    name: str = "object"
    """Of the class that the examples show."""
    learned: tuple[str, ...] = ()
    """Files of classes that `mshnet learn` wrote."""
    overlay: bool = False
    """Also a picture to look at for each query, NAME_overlay.png: the classes tinted and outlined."""
    threshold: float | None = None
    """Probability, 0..1, from which a pixel is an object's; without it each class's own (0.5 unless calibrated)."""
    calibrate: bool = False
    """Choose the examples' threshold so that each is segmented best by the others (two examples or more)."""
    tile_px: int = 0
    """Look at large pictures in overlapping windows of this many of their pixels; 0: as a whole."""
    overlap: float = 0.25
    """Share of a window that lies in the next one too, 0..0.75."""
    overwrite: bool = False
    """Make all masks anew. Without it, those that are done already under the same settings are skipped, and a file
    that was made otherwise is left alone: the command ends with an error before it begins."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1."""
    precision: Precision = "float32"
    """Of the computation; bfloat16 is for GPUs."""
    batch_size: int = 8
    """Pictures at a time on a GPU."""
    tracking_uri: str = ""
    """Of MLflow, for a registered model; empty: what MLFLOW_TRACKING_URI names, else sqlite:///outputs/mlflow.db."""

    def __post_init__(self) -> None:
        if not self.support and not self.learned:
            raise InputError("expected --support IMAGE MASK or --learned FILE to say what to look for, got neither")
        if not is_local(self.out):
            raise InputError(f"expected a folder of this machine for --out, got {self.out!r}; see pipelines/predict.py")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"threshold must be 0..1, got {self.threshold}")
        if self.batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, got {self.batch_size}")


@dataclass
class Done:
    """How it went, for the last line."""

    segmented: int = 0
    skipped: int = 0
    without_object: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)

    def fail(self, query: Query, error: Exception) -> None:
        """Name a query that could not be used; the others go on."""
        print(f"mshnet segment: {error}", file=sys.stderr, flush=True)
        self.failed.append({"query": str(query.path), "reason": str(error)})


def command(settings: Annotated[Segment, tyro.conf.arg(name="")]) -> None:
    """Segment pictures by a few labelled examples, or by classes that were learnt before; no training.

    Submitted again, it does only what is missing. A picture that cannot be read is named, the others are done, and
    the command ends with 1. The last line on stdout says as JSON what was done.
    """
    from mshnet.predict import Segmenter
    from mshnet.tiles import check_tiles

    started = time.monotonic()
    check_tiles(settings.tile_px, settings.overlap)
    out = Path(settings.out)
    queries = find_queries(settings.query, out, settings.overlay)
    examples = read_examples(settings.support) if settings.support else None
    supports = _supports(settings)
    segmenter = Segmenter.open(
        settings.model, tracking_uri=settings.tracking_uri, device=settings.device, precision=settings.precision
    )
    for support in supports:
        segmenter.add(support)
    if examples is not None:
        supports.append(segmenter.learn(settings.name, *examples, calibrate=settings.calibrate))
    results = Results(
        out=out,
        classes=segmenter.classes,
        settings=_fingerprint(settings, segmenter, supports),
        overlays=settings.overlay,
        overwrite=settings.overwrite,
    )
    results.check(queries)
    results.write_classes()
    done = _segment_all(segmenter, settings, queries, results)
    line = {
        "out": settings.out,
        "classes": list(segmenter.classes),
        "segmented": done.segmented,
        "skipped": done.skipped,
        "without_object": done.without_object,
        "failed": done.failed,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)
    if done.failed:
        raise InputError(f"{len(done.failed)} of {len(queries)} pictures could not be segmented (named above)")


def _supports(settings: Segment) -> list[SupportSet]:
    """The classes learnt before. Raises InputError for a name that comes twice."""
    from mshnet.support_set import SupportSet

    supports = [SupportSet.load(file) for file in settings.learned]
    names = [support.name for support in supports] + ([settings.name] if settings.support else [])
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"expected a name of its own for each class, found {', '.join(twice)} twice; see --name")
    if len(names) > MOST_CLASSES:
        raise InputError(f"expected {MOST_CLASSES} classes at most in one label picture, got {len(names)}")
    return supports


def _fingerprint(settings: Segment, segmenter: Segmenter, supports: list[SupportSet]) -> str:
    """Of all that a mask depends on beside its query."""
    choices = [settings.threshold, settings.tile_px, settings.overlap if settings.tile_px else 0, settings.precision]
    content = [segmenter.fingerprint, list(segmenter.classes), choices]
    digest = hashlib.sha256(json.dumps(content).encode())
    for support in supports:
        digest.update(f"{support.name} {support.threshold}".encode())
        digest.update(support.images.numpy().data)
        digest.update(support.masks.numpy().data)
    return digest.hexdigest()[:16]


def _segment_all(segmenter: Segmenter, settings: Segment, queries: list[Query], results: Results) -> Done:
    done = Done()
    waiting: deque[_Read] = deque()
    with bar(total=len(queries), desc="pictures", unit="image") as progress:

        def missing() -> Iterator[Any]:
            for query in queries:
                try:
                    read = _read(query, results)
                except InputError as error:
                    done.fail(query, error)
                    progress.update()
                    continue
                if read is None:
                    done.skipped += 1
                    progress.update()
                    continue
                waiting.append(read)
                yield read.image

        segmented = segmenter.batch(
            missing(), batch_size=settings.batch_size, tile_px=settings.tile_px, overlap=settings.overlap
        )
        for found in segmented:
            read = waiting.popleft()
            labels = _labels(found, settings.threshold)
            results.write(read.query, read.sha256, read.image, labels)
            done.segmented += 1
            done.without_object += not labels.any()
            progress.update()
    return done


@dataclass(frozen=True)
class _Read:
    """A query whose file was read, until its result comes."""

    query: Query
    sha256: str
    image: Any


def _read(query: Query, results: Results) -> _Read | None:
    """None where it is done already. Raises InputError for a file that cannot be used."""
    data = read_bytes(query.path)
    sha256 = hashlib.sha256(data).hexdigest()
    if results.is_done(query, sha256):
        return None
    return _Read(query, sha256, rgb(upright(decoded(data, str(query.path)))))


def _labels(segmented: Segmented, threshold: float | None) -> Any:
    if threshold is not None:
        segmented = replace(segmented, thresholds=(threshold,) * len(segmented.classes))
    return segmented.labels
