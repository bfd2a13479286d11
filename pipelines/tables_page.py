"""The filled tables as one self-contained HTML page, and as Markdown."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.cells import BACKBONES, SHOTS
from pipelines.chosen_runs import Apart, mean_miou
from pipelines.fold_table import interval_text, percent
from pipelines.pages import rendered
from pipelines.table_rows import BACKBONE_NAMES, NOT_PRINTED, Filled, Number, Row, behind
from pipelines.tracking_search import page_of

if TYPE_CHECKING:
    from pipelines.tables import Tables


def html(made: Tables) -> str:
    """The page; every number of ours leads to its run, on the server or in the page's own list."""
    context: dict[str, Any] = {
        "made": made,
        "shots": SHOTS,
        "address": _Addresses(made),
        "backbone_name": backbone_name,
        "backbones": BACKBONES,
        "behind": lambda filled: behind(filled.chosen),
        "day": day,
        "interval_text": interval_text,
        "mean_miou": mean_miou,
        "millions": millions,
        "percent": percent,
        "signed": signed,
        "standing": standing,
    }
    return rendered("tables.html.j2", context)


class _Addresses:
    """Where a run's number leads: its page on a server; else the row of its cross-validation in the page."""

    def __init__(self, made: Tables) -> None:
        self._addresses: dict[str, str] = {}
        for filled in made.filled:
            for run in filled.chosen.runs.values():
                anchor = f"#run-{filled.table.number}-{run.run_id}"
                for run_id in (run.run_id, *(fold.run_id for fold in run.folds)):
                    page = page_of(made.tracking_uri, run.experiment_id, run_id)
                    self._addresses.setdefault(run_id, page or anchor)

    def __call__(self, run_id: str) -> str:
        return self._addresses[run_id]


def backbone_name(backbone: str) -> str:
    """As tables print it."""
    return BACKBONE_NAMES.get(backbone, backbone)


def millions(count: int) -> str:
    """A number of parameters as the paper prints it."""
    return f"{count / 1e6:.1f}M"


def signed(points: float) -> str:
    """A difference with its sign; one that rounds to nothing has none."""
    text = f"{abs(points):.1f}"
    return text if text == "0.0" else f"{'+' if points > 0 else '−'}{text}"


def standing(number: Number) -> str:
    """How a difference is shown: lower or higher outside our interval, inside it, or unknown without one."""
    if number.inside is None:
        return "unknown"
    if number.inside:
        return "inside"
    return "higher" if (number.difference or 0) > 0 else "lower"


def day(milliseconds: int) -> str:
    """When a run was started, to the minute, in UTC."""
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def markdown(made: Tables) -> str:
    """The same as Markdown."""
    return "\n".join(_lines(made)) + "\n"


def _lines(made: Tables) -> Iterator[str]:
    yield from ("# The paper's tables, and what was measured here", "")
    yield f"MLflow experiment {_escaped(made.experiment)} at {_escaped(made.tracking_uri)}. IoU in % on novel classes; "
    yield "[from, to] is the 95 % interval; the number with a sign is the difference to the paper's number in the same "
    yield "place, in points, **bold** where the paper's lies outside our interval."
    for filled in made.filled:
        yield from ("", f"## Table {filled.table.number}: {filled.table.title}", "")
        yield from _numbers(filled)
        if filled.chosen.runs:
            yield from ("", "How ours were measured:", "")
            yield from (f"- {name}: {_escaped(value)}" for name, value in filled.chosen.measured)
            if filled.differs:
                yield from ("", "Where that is not the paper's way:", "")
                yield from _table(["", "here", "paper"], [list(row) for row in filled.differs])
            yield from ("", "Runs behind it:", "")
            rows = [
                [s.label, " ".join(map(str, s.folds)), s.training, s.weights, s.git_commit[:12], s.run_id]
                for s in behind(filled.chosen)
            ]
            yield from _table(["cells", "folds", "training", "weights", "commit", "run"], rows)
        if filled.chosen.apart:
            yield from ("", "Set apart:", "")
            yield from _apart(filled.chosen.apart)
    yield from ("", "## Other runs of this experiment", "")
    yield from _apart(made.other) if made.other else ["None."]


def _numbers(filled: Filled) -> Iterator[str]:
    columns = [f"{shot}-shot {name}" for shot in SHOTS for name in filled.table.columns]
    rows = [
        [backbone_name(block.backbone), row.label, *(_cell(number) for number in row.numbers), _parameters(row)]
        for block in filled.blocks
        for row in block.rows
    ]
    yield from _table(["backbone", "method", *columns, "learnable parameters"], rows, numbers=True)


def _cell(number: Number) -> str:
    if number.value is None:
        return "–" if number.state == NOT_PRINTED else number.state
    parts = [percent(number.value)]
    if number.interval:
        parts.append(interval_text(number.interval))
    if number.difference is not None:
        bold = "**" if number.inside is False else ""
        parts.append(f"{bold}{signed(number.difference)}{bold}")
    return " ".join([*parts, *([number.note] if number.note else [])])


def _parameters(row: Row) -> str:
    return millions(row.parameters) if row.parameters is not None else row.paper_parameters or "–"


def _apart(several: Sequence[Apart]) -> Iterator[str]:
    rows = [
        [apart.run.name, apart.run.status.lower(), percent(mean_miou(apart.run)), apart.why, apart.run.run_id]
        for apart in several
    ]
    yield from _table(["run", "status", "mIoU, %", "why not in the table", "run id"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * 2 + (" ---: |" if numbers else " --- |") * (len(header) - 2)
    for row in rows:
        yield "| " + " | ".join(cell if numbers else _escaped(cell) for cell in row) + " |"


def _escaped(text: str) -> str:
    for mark in "\\|<>*`[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")
