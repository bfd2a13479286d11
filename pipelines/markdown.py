"""Markdown from names and numbers that may hold its marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

GAP = "\u00a0\u00a0"
"""Before a cell: MLflow's pages put columns close together."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table: the first column to the left, the others to the right. Cells are escaped."""
    yield f"| {f' | {GAP}'.join(header)} |"
    yield "|" + " --- |" + " ---: |" * (len(header) - 1)
    for row in rows:
        yield f"| {f' | {GAP}'.join(escaped(cell) for cell in row)} |"


def escaped(text: str) -> str:
    """The text as it is, on one line, whatever it holds."""
    for mark in "\\|<>*`[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")
