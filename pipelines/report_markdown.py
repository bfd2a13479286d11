"""The report as Markdown, its pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from pipelines import report_sections as sections
from pipelines.fold_table import (
    CHOSEN_ON_TEST_NOTE,
    NO_PAPER_ROW,
    beside_paper,
    fact_table,
    interval_text,
    paper_row,
    percent,
    setting,
    table_header,
    table_rows,
)
from pipelines.markdown import escaped, table
from pipelines.report_sections import picture_name
from pipelines.results import CrossValidation, EpisodeOutcome, FoldResult


def markdown(result: CrossValidation, pictures: Mapping[str, bytes]) -> Iterator[str]:
    """Its lines; `pictures` are the names of those that lie beside it, and those missing are named in it."""

    def image(name: str, text: str) -> str:
        return f"![{text}]({name})" if name in pictures else f"*(picture missing: {name})*"

    def shown(fold: FoldResult, panel: EpisodeOutcome) -> Iterator[str]:
        text = f"{panel.rank}: {panel.class_name}, IoU {percent(100 * panel.iou)} %"
        yield from ("", escaped(sections.caption(fold, panel)), "")
        yield image(picture_name(fold.fold, panel.picture), escaped(text))

    yield from (f"# {escaped(result.name)}", "", escaped(setting(result)), "", "mIoU on novel classes, %:", "")
    yield from _fold_table(result)
    yield from ("", "## How it was measured", "", "Numbers compare only where these agree.", "")
    yield from table(*fact_table(result))
    for heading, text, of in sections.SECTIONS:
        if found := of(result):
            yield from ("", f"## {heading}", "", f"{text}{_note(result)}.")
            if heading == "By object size":
                yield from ("", sections.size_note())
            yield from ("", *table(found.header, found.rows))
    if sections.INTERVALS in pictures:
        yield from ("", image(sections.INTERVALS, "95 % intervals"), "", sections.INTERVAL_NOTE)
    if sections.SIZES in pictures:
        yield from ("", image(sections.SIZES, "mIoU by object size"))
    if features := sections.feature_table(result):
        yield from ("", "## Features of the backbone", "", *table(features.header, features.rows))
    if not result.given:
        yield from ("", "## Learning curves", "", image(sections.CURVES, "learning curves of all folds"))
    for fold in result.folds:
        note = f" ({CHOSEN_ON_TEST_NOTE})" if fold.chosen_on_test else ""
        yield from ("", f"## Fold {fold.fold}: mIoU {percent(100 * fold.score.miou)} %{note}", "")
        yield from (sections.fold_summary(fold) + ".", "")
        by_class = sections.class_table(fold)
        yield from table(by_class.header, by_class.rows)
        yield from ("", image(picture_name(fold.fold, fold.bars_picture), f"IoU by class, fold {fold.fold}"))
    for rank in sections.TYPICAL:
        if panels := sections.ranked(result, rank):
            yield from ("", f"## {rank.capitalize()} episodes")
            for fold, panel in panels:
                yield from shown(fold, panel)
    energies = [(fold, panel) for fold in result.folds for panel in fold.panels if panel.energy]
    if energies:
        yield from ("", "## Energy maps", "", sections.ENERGY_NOTE)
        for fold, panel in energies:
            text = escaped(f"{panel.rank}: {panel.class_name}")
            yield from ("", escaped(sections.caption(fold, panel)), "")
            yield image(picture_name(fold.fold, panel.energy), f"energy maps, {text}")
    for rank, (heading, definition) in sections.FAILURES.items():
        if panels := sections.ranked(result, rank):
            yield from ("", f"## Failures: {heading.lower()}", "", definition)
            for fold, panel in panels:
                yield from shown(fold, panel)
    yield from _provenance(result)


def _note(result: CrossValidation) -> str:
    return f", {CHOSEN_ON_TEST_NOTE}" if result.chosen_on_test else ""


def _fold_table(result: CrossValidation) -> Iterator[str]:
    rows = []
    for row in table_rows(result):
        rows.append([row.label, *row.cells])
        if row.intervals:
            rows.append(["95 % interval", *(interval_text(known) for known in row.intervals)])
    if beside_paper(result) and not paper_row(result):
        rows.append(["paper", *([NO_PAPER_ROW] + [""] * (len(table_header(result)) - 1))])
    yield from table(["", *table_header(result)], rows)


def _provenance(result: CrossValidation) -> Iterator[str]:
    yield from ("", "## Provenance", "", "### The protocol in full", "")
    protocol = sections.protocol_table(result)
    yield from table(protocol.header, protocol.rows)
    for heading, entries in sections.provenance(result):
        if entries:
            yield from ("", f"### {heading}", "")
            yield from table(["", ""], entries)
    yield from ("", "### Config", "", "```json", json.dumps(result.config, indent=2, default=str), "```")
