"""The report of a cross-validation: one self-contained HTML page; one Markdown file, its pictures beside it.

`python -m pipelines.report --result FILE_OR_URI.json --out DIR` writes both again from a stored result.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mshnet.command_line import run
from mshnet.errors import InputError
from pipelines.fold_table import (
    CHOSEN_ON_TEST_NOTE,
    LABELS,
    NO_PAPER_ROW,
    NOTHING,
    facts,
    fold_table_text,
    paper_row,
    percent,
    setting,
    table_header,
    table_rows,
)
from pipelines.results import BASELINES, CrossValidation, FoldResult

__all__ = ["fold_table_text", "write_report"]

RANKS = ("best", "median", "worst")


def picture_name(fold: int, file_name: str) -> str:
    """The key of a fold's picture in `pictures`, and its path beside the Markdown file."""
    return f"fold{fold}/{file_name}"


def write_report(result: CrossValidation, pictures: Mapping[str, bytes], out: str | Path) -> tuple[Path, Path]:
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
    return [(name, [percent(100 * s.class_iou.get(name, math.nan)) for s in series]) for name in fold.novel_classes]


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
        "paper": paper_row(result),
        "no_paper_row": NO_PAPER_ROW,
        "facts": facts(result),
        "provenance": provenance(result),
        "config": json.dumps(result.config, indent=2, sort_keys=True, default=str),
        "ranks": RANKS,
        "margin": _margin(result),
        "chosen_on_test_note": CHOSEN_ON_TEST_NOTE,
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
    if not paper_row(result):
        rows.append(["paper", *([NO_PAPER_ROW] + [""] * (len(table_header(result)) - 1))])
    yield from _markdown_table(["", *table_header(result)], rows)
    yield from ("", "## How it was measured", "", "Numbers compare only where these agree.", "")
    yield from _markdown_table(["", "here", "paper"], [[f.name, f.here, f.paper] for f in facts(result)])
    yield from ("", "## Learning curves", "", image("curves.png", "learning curves of all folds"))
    for fold in result.folds:
        note = f" ({CHOSEN_ON_TEST_NOTE})" if fold.chosen_on_test else ""
        yield from ("", f"## Fold {fold.fold}: mIoU {percent(100 * fold.score.miou)} %{note}", "")
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
        result: File or URI of the cross_validation.json of a job's report, its pictures in fold0/ ... beside it.
        out: Folder for report.html, report.md and the pictures.
    """
    from pipelines import storage

    try:
        loaded = CrossValidation.from_json(storage.read_bytes(result))
    except FileNotFoundError as error:
        raise InputError(
            f"no result at {result!r}; give the cross_validation.json that a job wrote beside its report"
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
