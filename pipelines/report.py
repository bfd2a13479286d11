"""The report of a cross-validation: one self-contained HTML page; one Markdown file, its pictures beside it.

`python -m pipelines.report --result FILE_OR_URI.json --out DIR` writes both again from a stored result.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mshnet.command_line import run
from mshnet.errors import InputError
from pipelines import paper_numbers
from pipelines.results import BASELINES, CrossValidation, FoldResult

LABELS = {
    "trained": "MSHNet, trained",
    "untrained": "same network, untrained",
    "foreground": "everything is foreground",
    "prototype": "prototype matching, no training",
}
RANKS = ("best", "median", "worst")
NO_PAPER_ROW = "not in the paper"
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of the fold table: mIoU in % per fold, their mean, FB-IoU; None where there is no number."""

    key: str
    label: str
    values: tuple[float | None, ...]

    @property
    def cells(self) -> list[str]:
        """The values as text."""
        return [percent(value) for value in self.values]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """How one thing was done here and in the paper."""

    name: str
    here: str
    paper: str


def percent(value: float | None) -> str:
    """A number already in %, to one decimal; a dash where there is none."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.1f}"


def picture_name(fold: int, file_name: str) -> str:
    """The key of a fold's picture in `pictures`, and its path beside the Markdown file."""
    return f"fold{fold}/{file_name}"


def table_header(result: CrossValidation) -> list[str]:
    """Column names of the fold table, the first column's left out."""
    return [*(f"fold {fold.fold}" for fold in result.folds), "mean", "FB-IoU"]


def table_rows(result: CrossValidation) -> list[TableRow]:
    """The trained network, the baselines that were measured, the paper's row if it has one."""
    ours = [100 * fold.score.miou for fold in result.folds]
    rows = [_row("trained", [*ours, 100 * result.mean_miou, 100 * result.mean_fb_iou])]
    for key in BASELINES:
        scores = [fold.baselines.get(key) for fold in result.folds]
        if any(scores):
            by_fold = [None if score is None else 100 * score.miou for score in scores]
            fb_iou = _mean([None if score is None else 100 * score.fb_iou for score in scores])
            rows.append(_row(key, [*by_fold, _mean(by_fold), fb_iou]))
    paper = _paper(result)
    if paper:
        by_fold = [paper.fold_miou[fold.fold] for fold in result.folds]
        whole = len(by_fold) == len(paper.fold_miou)
        values = [*by_fold, paper.mean_miou if whole else _mean(by_fold), paper.fb_iou if whole else None]
        rows.append(TableRow(key="paper", label=f"paper, table {paper.table}", values=tuple(values)))
    return rows


def _row(key: str, values: Sequence[float | None]) -> TableRow:
    return TableRow(key=key, label=LABELS[key], values=tuple(values))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _paper(result: CrossValidation) -> paper_numbers.PaperRow | None:
    return paper_numbers.paper_row(result.dataset, result.backbone, result.similarity, result.shot)


def facts(result: CrossValidation) -> list[Fact]:
    """What has to agree before two numbers can be compared."""
    folds = result.folds
    there = _paper(result) is not None
    pairs = [
        ("test episodes", _by_fold(folds, [f.protocol for f in folds]), paper_numbers.PROTOCOL),
        ("checkpoint", _by_fold(folds, [f.selection for f in folds]), paper_numbers.SELECTION),
        ("split lists", _by_fold(folds, [f.split_lists for f in folds]), paper_numbers.SPLIT_LISTS),
        ("masks", result.mask_mode, paper_numbers.MASK_MODES.get(result.dataset, NOTHING)),
        ("image size", f"{result.image_size_px} px", f"{paper_numbers.IMAGE_SIZE_PX} px"),
        (
            "learnable parameters",
            f"{result.learnable_parameters:,}",
            paper_numbers.PARAMETERS.get(result.similarity, NOTHING),
        ),
    ]
    return [Fact(name=name, here=here, paper=paper if there else NO_PAPER_ROW) for name, here, paper in pairs]


def _by_fold(folds: Sequence[FoldResult], values: Sequence[str]) -> str:
    if len(set(values)) <= 1:
        return values[0] if values else NOTHING
    return "; ".join(f"fold {fold.fold}: {value}" for fold, value in zip(folds, values, strict=True))


def setting(result: CrossValidation) -> str:
    """The run in one line."""
    similarity = "both similarities" if result.similarity == "both" else f"{result.similarity} similarity"
    return (
        f"{result.dataset}, {result.backbone}, {similarity}, {result.shot}-shot, {result.image_size_px} px, "
        f"{len(result.folds)} of 4 folds"
    )


def fold_table_text(result: CrossValidation) -> str:
    """The fold table for a terminal: mIoU in % per fold, mean, FB-IoU; the paper's row last."""
    header, rows = table_header(result), table_rows(result)
    width = max(len(label) for label in [*(row.label for row in rows), "mIoU, %"])
    columns = [max(6, len(name)) for name in header]

    def line(label: str, cells: Sequence[str]) -> str:
        return f"{label:<{width}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, columns, strict=True))

    rule = "-" * (width + sum(columns) + 2 * len(columns))
    lines = [setting(result), rule, line("mIoU, %", header), rule]
    lines += [line(row.label, row.cells) for row in rows]
    if not _paper(result):
        lines.append(f"{'paper':<{width}}  {NO_PAPER_ROW}")
    return "\n".join([*lines, rule])


def write_report(
    result: CrossValidation, pictures: Mapping[str, bytes], out: str | Path
) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` (with its pictures) into the folder `out`; returns both paths.

    `pictures` holds PNG files by `picture_name(fold, file)`. One that is missing is named in the report.
    """
    if not result.folds:
        raise InputError("expected a cross-validation with at least one fold to report, got none")
    folder = Path(out)
    drawn = {"curves.png": _curves(result), **pictures}
    for name, data in drawn.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"expected the name of a picture below the report's folder, got {name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    html, markdown = folder / "report.html", folder / "report.md"
    html.write_text(_html(result, drawn), encoding="utf-8")
    markdown.write_text("\n".join(_markdown(result, drawn)) + "\n", encoding="utf-8")
    return html, markdown


def _curves(result: CrossValidation) -> bytes:
    from mshnet.visualize import learning_curves

    return learning_curves(
        {f"fold {f.fold}": [(e.epoch, e.loss, e.validation_miou) for e in f.history] for f in result.folds}
    )


def fold_summary(fold: FoldResult) -> str:
    """How the fold was trained and tested, in one line."""
    return (
        f"best epoch {fold.best_epoch} of {len(fold.history)}, {fold.train_episodes:,} training episodes in "
        f"{duration(fold.train_s)}, {fold.score.episodes:,} test episodes in {duration(fold.evaluate_s)}"
    )


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def class_rows(fold: FoldResult) -> list[tuple[str, list[str]]]:
    """Per novel class, IoU in %: trained, then the baselines measured."""
    series = [fold.score, *(fold.baselines[key] for key in BASELINES if key in fold.baselines)]
    return [
        (name, [percent(100 * s.class_iou.get(name, math.nan)) for s in series])
        for name in fold.novel_classes
    ]


def class_header(fold: FoldResult) -> list[str]:
    """Column names of `class_rows`."""
    return ["trained", *(key for key in BASELINES if key in fold.baselines)]


def provenance(result: CrossValidation) -> list[tuple[str, list[tuple[str, str]]]]:
    """What leads from a number back to code, data, config and runs: (heading, (name, value) rows)."""
    run_rows = [("cross-validation", result.parent_run_id or NOTHING)]
    run_rows += [(f"fold {fold.fold}", fold.run_id or NOTHING) for fold in result.folds]
    models = [
        (f"fold {f.fold}", f"version {f.model_version}, {f.checkpoint}" if f.model_version else f.checkpoint)
        for f in result.folds
    ]
    return [
        ("Code", [("git commit", result.git_commit or NOTHING), *sorted(result.versions.items())]),
        ("Data fingerprints", sorted(result.fingerprints.items())),
        ("MLflow runs", run_rows),
        ("Models", models),
        ("Where things lie", sorted(result.artifacts.items())),
    ]


def _html(result: CrossValidation, pictures: Mapping[str, bytes]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def inline(name: str) -> str | None:
        data = pictures.get(name)
        return None if data is None else "data:image/png;base64," + base64.b64encode(data).decode()

    context: dict[str, Any] = {
        "result": result,
        "setting": setting(result),
        "header": table_header(result),
        "rows": table_rows(result),
        "paper": _paper(result),
        "no_paper_row": NO_PAPER_ROW,
        "facts": facts(result),
        "provenance": provenance(result),
        "config": json.dumps(result.config, indent=2, sort_keys=True, default=str),
        "ranks": RANKS,
        "margin": _margin(result),
        "inline": inline,
        "picture_name": picture_name,
        "percent": percent,
        "fold_summary": fold_summary,
        "class_rows": class_rows,
        "class_header": class_header,
    }
    return environment.get_template("report.html.j2").render(context)


def _margin(result: CrossValidation) -> tuple[float, str] | None:
    """By how many points the trained mean exceeds the best baseline's mean, and which that is."""
    means = {key: mean for key in BASELINES if (mean := result.baseline_miou(key)) is not None}
    if not means:
        return None
    best = max(means, key=lambda key: means[key])
    return 100 * (result.mean_miou - means[best]), LABELS[best]


def _markdown(result: CrossValidation, pictures: Mapping[str, bytes]) -> Iterator[str]:
    def image(name: str, text: str) -> str:
        return f"![{text}]({name})" if name in pictures else f"*(picture missing: {name})*"

    yield from (
        f"# {_escaped(result.name)}",
        "",
        _escaped(setting(result)),
        "",
        "mIoU on novel classes, %:",
        "",
    )
    rows = [[row.label, *row.cells] for row in table_rows(result)]
    if not _paper(result):
        rows.append(["paper", *([NO_PAPER_ROW] + [""] * (len(table_header(result)) - 1))])
    yield from _markdown_table(["", *table_header(result)], rows)
    yield from ("", "## How it was measured", "", "Numbers compare only where these agree.", "")
    yield from _markdown_table(["", "here", "paper"], [[f.name, f.here, f.paper] for f in facts(result)])
    yield from ("", "## Learning curves", "", image("curves.png", "learning curves of all folds"))
    for fold in result.folds:
        yield from ("", f"## Fold {fold.fold}: mIoU {percent(100 * fold.score.miou)} %", "")
        yield from (fold_summary(fold) + ".", "")
        yield from _markdown_table(
            ["IoU, %", *class_header(fold)], [[name, *cells] for name, cells in class_rows(fold)]
        )
        yield from ("", image(picture_name(fold.fold, fold.bars_picture), f"IoU by class, fold {fold.fold}"))
        for panel in fold.panels:
            text = f"{panel.rank}: {panel.class_name}, IoU {percent(100 * panel.iou)} %"
            source = f"query {panel.query}; support {', '.join(panel.supports)}"
            yield from ("", f"**{_escaped(text)}** ({_escaped(source)})", "")
            yield image(picture_name(fold.fold, panel.picture), _escaped(text))
    yield from ("", "## Provenance")
    for heading, entries in provenance(result):
        if entries:
            yield from ("", f"### {heading}", "")
            yield from _markdown_table(["", ""], [[name, value] for name, value in entries])
    yield from ("", "### Config", "", "```json", json.dumps(result.config, indent=2, default=str), "```")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" + " ---: |" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(_escaped(cell) for cell in row) + " |"


def _escaped(text: str) -> str:
    for mark in "\\|<>*`[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")


def report(result: str, out: str) -> None:
    """Write the report of a stored cross-validation again.

    Args:
        result: File or URI of a cross-validation's result.json, its pictures in fold0/ ... beside it.
        out: Folder for report.html, report.md and the pictures.
    """
    from pipelines import storage

    try:
        loaded = CrossValidation.from_json(storage.read_bytes(result))
    except FileNotFoundError as error:
        raise InputError(
            f"no result at {result!r}; give the result.json that cross_validate wrote"
        ) from error
    html, markdown = write_report(loaded, dict(_stored_pictures(loaded, result)), out)
    print(fold_table_text(loaded))
    print(json.dumps({"html": str(html), "markdown": str(markdown)}))


def _stored_pictures(result: CrossValidation, uri: str) -> Iterator[tuple[str, bytes]]:
    from pipelines import storage

    folder = uri.rpartition("/")[0] or "."
    for fold in result.folds:
        for file_name in [fold.curve_picture, fold.bars_picture, *(panel.picture for panel in fold.panels)]:
            name = picture_name(fold.fold, file_name)
            if storage.exists(storage.join(folder, name)):
                yield name, storage.read_bytes(storage.join(folder, name))


if __name__ == "__main__":
    run(report, "python -m pipelines.report")
