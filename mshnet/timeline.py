"""Spans of time: what is left of some when others are taken away, and which of nested ones is the innermost."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

Span = tuple[float, float]
"""Start and end."""


def length(spans: Iterable[Span]) -> float:
    """Of all of them together."""
    return math.fsum(end - start for start, end in spans)


def union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def overlap(spans: Iterable[Span], others: Sequence[Span]) -> list[Span]:
    """Moments of `spans` that are in `others` too, which are disjoint and in order."""
    found = []
    for start, end in spans:
        i = bisect.bisect_right(others, start, key=lambda other: other[1])
        while i < len(others) and others[i][0] < end:
            found.append((max(start, others[i][0]), min(end, others[i][1])))
            i += 1
    return found


def minus(spans: Iterable[Span], others: Sequence[Span]) -> list[Span]:
    """Moments of `spans` that are not in `others`, which are disjoint and in order."""
    left = []
    for start, end in spans:
        for a, b in overlap([(start, end)], others):
            if a > start:
                left.append((start, a))
            start = b
        if end > start:
            left.append((start, end))
    return left


def innermost(named: Iterable[tuple[Span, str]]) -> list[tuple[Span, str]]:
    """Nested spans as disjoint pieces in order, each with the name of the innermost one there."""
    ordered = sorted(named, key=lambda item: (item[0][0], -item[0][1]))
    pieces: list[tuple[Span, str]] = []
    for i, (span, name) in enumerate(ordered):
        inner = takewhile(lambda item: item[0][0] < span[1], islice(ordered, i + 1, None))  # noqa: B023 - used at once
        pieces += [(piece, name) for piece in minus([span], union(child for child, _ in inner))]
    return sorted(pieces)
