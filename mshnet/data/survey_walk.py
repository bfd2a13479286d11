"""Every image of a source, read and measured once; what cannot be used is told, not raised."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mshnet.data.source import ImageRecord, Source
from mshnet.data.survey_facts import Problem, SurveyedImage
from mshnet.errors import InputError

AHEAD = 4
"""Images that are read side by side."""


def walk(source: Source, threads: int = AHEAD) -> Iterator[SurveyedImage | Problem]:
    """Every image of a source, in its order, or why it cannot be used. DatasetNotFoundError where there is none."""
    problems: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[SurveyedImage | Problem]] = deque()
        for record in source.usable_records(problems.append):
            waiting.append(pool.submit(look, source, record))
            if len(waiting) > threads:
                yield waiting.popleft().result()
            yield from _told(problems, source.root)
        while waiting:
            yield waiting.popleft().result()
    yield from _told(problems, source.root)


def _told(problems: list[str], where: str) -> Iterator[Problem]:
    while problems:
        yield Problem(where=where, what=problems.pop(0), stops=True)


def look(source: Source, record: ImageRecord) -> SurveyedImage | Problem:
    """One image."""
    try:
        labelled = source.load(record)
    except InputError as error:
        return Problem(where=record.image_id, what=str(error), stops=True)
    height, width = labelled.image.shape[:2]
    shown = {c: int(np.count_nonzero(mask)) for c, mask in labelled.masks.items()}
    return SurveyedImage(
        image_id=record.image_id,
        subset=record.subset,
        height=height,
        width=width,
        pixels={c: n for c, n in shown.items() if n},
        digest=hashlib.blake2b(np.ascontiguousarray(labelled.image).data, digest_size=16).hexdigest(),
        notes=labelled.notes,
    )


def twice(images: Iterable[SurveyedImage]) -> Iterator[Problem]:
    """Pictures that are there under several names: one may be query and support, or trained on and tested on."""
    names: dict[str, list[str]] = {}
    for image in images:
        if image.digest:
            names.setdefault(image.digest, []).append(image.image_id)
    for same in names.values():
        if len(same) > 1:
            others = ", ".join(repr(name) for name in same[1:4]) + (f" and {len(same) - 4} more" if same[4:] else "")
            what = f"the same picture as {others}: a number that was made with both flatters; keep one of them"
            yield Problem(where=same[0], what=what, stops=False)
