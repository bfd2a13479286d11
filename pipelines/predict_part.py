"""A part of a batch prediction, as a Ray task does it: some pictures in, their masks and a table out."""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mshnet.errors import InputError
from pipelines import storage
from pipelines.predictions import INPUTS, MASKS, OVERLAYS, PARTS, Query, rle, table_bytes

if TYPE_CHECKING:
    from mshnet.predict import Segmented, Segmenter

MODEL, LEARNED = "model", "learned"
AHEAD = 8
"""Pictures that are fetched, and results that are written, beside the one that is segmented."""


@dataclass(frozen=True, kw_only=True)
class PartSettings:
    """What the tasks of a prediction have in common."""

    queries: str
    out: str
    key: str
    """Of model, classes and settings."""
    learned: int
    """Files of classes among the inputs."""
    overlay: bool
    tile_px: int
    overlap: float
    threshold: float | None
    precision: str
    use_gpu: bool


@dataclass(frozen=True)
class _Read:
    query: Query
    sha256: str
    pixels: np.ndarray


def part_name(number: int, queries: Sequence[Query]) -> str:
    """Of a part's files, without ending: other queries never have the same."""
    listed = "\n".join(f"{query.path}\t{query.size_bytes}\t{query.version}" for query in queries)
    return f"{number:05d}-{hashlib.sha256(listed.encode()).hexdigest()[:12]}"


def predict_part(settings: PartSettings, name: str, queries: Sequence[Query]) -> Mapping[str, Any]:
    """Segment the queries; masks first, then the table. A picture that cannot be read becomes a row that says so.

    Raises InputError where the folder of queries is not there at all, as on a node that lacks it.
    """
    if not storage.exists(settings.queries):
        raise InputError(
            f"expected the queries at {settings.queries!r}, found nothing there on this node; give a folder that all "
            "nodes reach, or a URI such as s3://BUCKET/pictures"
        )
    segmenter = _segmenter(settings)
    rows: list[dict[str, Any]] = []
    waiting: deque[_Read] = deque()
    with ThreadPoolExecutor(AHEAD) as pool:
        writing: deque[Future[None]] = deque()
        pictures = _readable(settings, queries, pool, waiting, rows)
        for segmented in segmenter.batch(pictures, tile_px=settings.tile_px, overlap=settings.overlap):
            read = waiting.popleft()
            rows += _rows(read, segmented)
            writing.append(pool.submit(_write, settings, read, segmented))
            while len(writing) > AHEAD:
                writing.popleft().result()
        for one in writing:
            one.result()
    order = {query.path: i for i, query in enumerate(queries)}
    rows.sort(key=lambda row: order[row["query"]])  # of one query the classes stay in their order
    data = table_bytes(rows, settings.key)
    file = f"{name}.arrow"
    storage.write_bytes(storage.join(settings.out, PARTS, file), data)
    return {
        "name": file,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "rows": len(rows),
        "key": settings.key,
        "queries": [[query.path, query.size_bytes, query.version] for query in queries],
        "unreadable": {row["query"]: row["error"] for row in rows if row["error"]},
    }


def _segmenter(settings: PartSettings) -> Segmenter:
    device = "cuda" if settings.use_gpu else "cpu"
    folder = storage.join(settings.out, INPUTS, settings.key)
    return _opened(folder, settings.learned, settings.threshold, device, settings.precision)


@functools.lru_cache(maxsize=1)
def _opened(folder: str, learned: int, threshold: float | None, device: str, precision: Any) -> Segmenter:
    """Once for each process, which Ray uses again for the next part."""
    from mshnet.predict import Segmenter, SupportSet

    segmenter = Segmenter.from_checkpoint(storage.join(folder, MODEL), device=device, precision=precision)
    for number in range(learned):
        support = SupportSet.load(storage.join(folder, LEARNED, f"{number:03d}.safetensors"))
        if threshold is not None:
            support = replace(support, threshold=threshold, model=segmenter.fingerprint)
        segmenter.add(support)
    return segmenter


def _readable(
    settings: PartSettings,
    queries: Sequence[Query],
    pool: ThreadPoolExecutor,
    waiting: deque[_Read],
    rows: list[dict[str, Any]],
) -> Iterator[np.ndarray]:
    """Pixels of what can be read; of the others a row with the reason."""
    left = deque(queries)
    fetching: deque[tuple[Query, Future[bytes]]] = deque()
    while left or fetching:
        while left and len(fetching) < AHEAD:
            query = left.popleft()
            fetching.append((query, pool.submit(storage.read_bytes, storage.join(settings.queries, query.path))))
        query, data = fetching.popleft()
        try:
            read = _read(query, data)
        except (InputError, FileNotFoundError) as error:
            reason = "gone since it was listed" if isinstance(error, FileNotFoundError) else str(error)
            rows.append(_row(query, error=reason))
            continue
        waiting.append(read)
        yield read.pixels


def _read(query: Query, data: Future[bytes]) -> _Read:
    from mshnet.data.picture_files import decoded
    from mshnet.data.pictures import rgb, upright

    content = data.result()
    return _Read(query, hashlib.sha256(content).hexdigest(), rgb(upright(decoded(content, query.path))))


def _rows(read: _Read, segmented: Segmented) -> Iterator[dict[str, Any]]:
    height, width = segmented.labels.shape
    for index, name in enumerate(segmented.classes):
        mask = segmented.mask_of(name)
        inside = segmented.probabilities[index][mask]
        yield {
            **_row(read.query),
            "sha256": read.sha256,
            "height": height,
            "width": width,
            "class": name,
            "threshold": segmented.thresholds[index],
            "pixels": int(mask.sum()),
            "mean_probability": float(inside.mean(dtype=np.float64)) if inside.size else None,
            "rle": rle(mask),
            "mask": f"{MASKS}/{read.query.path}.png",
        }


def _row(query: Query, error: str | None = None) -> dict[str, Any]:
    return {"query": query.path, "size_bytes": query.size_bytes, "version": query.version, "error": error}


def _write(settings: PartSettings, read: _Read, segmented: Segmented) -> None:
    from mshnet.commands.results import label_picture
    from mshnet.visualize.labels import label_overlay
    from mshnet.visualize.style import png_bytes

    name = f"{read.query.path}.png"
    if settings.overlay:
        drawn = label_overlay(read.pixels, segmented.labels.astype(np.int64), segmented.classes)
        storage.write_bytes(storage.join(settings.out, OVERLAYS, name), png_bytes(drawn))
    picture = label_picture(segmented.labels, len(segmented.classes))
    storage.write_bytes(storage.join(settings.out, MASKS, name), png_bytes(picture))
