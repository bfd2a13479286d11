"""Arithmetic of spans, against counting whole seconds one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mshnet.timeline import Span, innermost, length, minus, overlap, union

SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda pair: (float(pair[0]), float(pair[0] + pair[1])))
)


def seconds(spans: list[Span]) -> set[int]:
    return {second for start, end in spans for second in range(int(start), int(end))}


@given(SPANS, SPANS)
def test_sets_of_moments(spans: list[Span], others: list[Span]) -> None:
    assert seconds(union(spans)) == seconds(spans)
    assert length(union(spans)) == len(seconds(spans))
    assert seconds(overlap(spans, union(others))) == seconds(spans) & seconds(others)
    assert seconds(minus(spans, union(others))) == seconds(spans) - seconds(others)


def test_the_innermost_name_has_the_moment() -> None:
    named = [
        ((2.0, 4.0), "b"),
        ((0.0, 10.0), "a"),
        ((5.0, 9.0), "c"),
        ((6.0, 7.0), "a"),
        ((12.0, 13.0), "d"),
        ((12.0, 15.0), "e"),
    ]
    assert innermost(named) == [
        ((0.0, 2.0), "a"), ((2.0, 4.0), "b"), ((4.0, 5.0), "a"), ((5.0, 6.0), "c"), ((6.0, 7.0), "a"),
        ((7.0, 9.0), "c"), ((9.0, 10.0), "a"), ((12.0, 13.0), "d"), ((13.0, 15.0), "e"),
    ]  # fmt: skip
