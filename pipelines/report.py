"""The report of a cross-validation: one self-contained HTML page; one Markdown file, its pictures beside it.

    python -m pipelines.report show --result FILE_OR_URI.json --out DIR
    python -m pipelines.report figure --results FIVE_SHOT.json ONE_SHOT.json --out FILE.png
    python -m pipelines.report tables --tracking-uri URI --out DIR

write a stored result's report again, put its episodes together as the paper's figure of results, and fill the paper's
tables from the tracker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from mshnet.command_line import run
from mshnet.errors import InputError
from pipelines.fold_table import fold_table_text
from pipelines.report_markdown import markdown
from pipelines.report_page import html
from pipelines.report_sections import charts, picture_name, pictured_files, ranked
from pipelines.results import CrossValidation

__all__ = ["fold_table_text", "picture_name", "pictured_files", "write_report"]


def write_report(result: CrossValidation, pictures: Mapping[str, bytes], out: str | Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` (with its pictures) into the folder `out`; returns both paths.

    `pictures` holds PNG files by `picture_name(fold, file)`. One that is missing is named in the report.
    """
    if not result.folds:
        raise InputError("expected a cross-validation with at least one fold to report, got none")
    folder = Path(out)
    for name in pictures:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"expected the name of a picture below the report's folder, got {name!r}")
    drawn = {**charts(result), **pictures}
    for name, data in drawn.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    page, text = folder / "report.html", folder / "report.md"
    page.write_text(html(result, drawn), encoding="utf-8")
    text.write_text("\n".join(markdown(result, drawn)) + "\n", encoding="utf-8")
    return page, text


def show(result: str, out: str) -> None:
    """Write the report of a stored cross-validation again.

    Args:
        result: File or URI of the cross_validation.json of a job's report, its pictures in fold0/ ... beside it.
        out: Folder for report.html, report.md and the pictures.
    """
    loaded = _loaded(result)
    page, text = write_report(loaded, dict(_stored_pictures(loaded, result)), out)
    print(fold_table_text(loaded))
    print(json.dumps({"html": str(page), "markdown": str(text)}))


def figure(
    results: tuple[str, ...], out: str, rank: Literal["best", "median", "worst"] = "best", rows: int = 1
) -> None:
    """Put episodes of stored cross-validations together as one picture, as the paper's figure of results.

    Args:
        results: Files or URIs of cross_validation.json, a column of episodes for each: 5-shot, then 1-shot.
        out: The PNG file.
        rank: Which of the pictured episodes.
        rows: Episodes of each fold.
    """
    from mshnet.visualize import episode_figure
    from pipelines import storage

    if rows < 1:
        raise InputError(f"rows must be 1 or more, got {rows}")
    columns: dict[str, list[bytes]] = {}
    for uri in results:
        loaded = _loaded(uri)
        name = f"{loaded.shot}-shot"
        if name in columns:
            name = f"{loaded.name}, {len(columns) + 1}"
        pictures = dict(_stored_pictures(loaded, uri))
        shown = [
            picture_name(fold.fold, panel.picture)
            for fold in loaded.folds
            for _, panel in [pair for pair in ranked(loaded, rank) if pair[0] is fold][:rows]
        ]
        columns[name] = [pictures[file] for file in shown if file in pictures]
    storage.write_bytes(out, episode_figure(columns))
    print(json.dumps({"figure": out}))


def _loaded(uri: str) -> CrossValidation:
    from pipelines import storage

    try:
        return CrossValidation.from_json(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise InputError(
            f"no result at {uri!r}; give the cross_validation.json that a job wrote beside its report"
        ) from error


def _stored_pictures(result: CrossValidation, uri: str) -> Iterator[tuple[str, bytes]]:
    from pipelines import storage

    folder = uri.rpartition("/")[0] or "."
    for fold in result.folds:
        for file_name in pictured_files(fold):
            name = picture_name(fold.fold, file_name)
            if storage.exists(storage.join(folder, name)):
                yield name, storage.read_bytes(storage.join(folder, name))


if __name__ == "__main__":
    from pipelines.tables import tables

    run({"show": show, "figure": figure, "tables": tables}, "python -m pipelines.report")
