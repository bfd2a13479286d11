"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from pipelines import report_sections as sections
from pipelines.fold_table import (
    CHOSEN_ON_TEST_NOTE,
    LABELS,
    NO_PAPER_ROW,
    beside_paper,
    facts,
    in_percent,
    interval_text,
    paper_row,
    percent,
    setting,
    table_header,
    table_rows,
)
from pipelines.pages import rendered
from pipelines.results import BASELINES, CrossValidation

PHOTO_QUALITY = 90
"""Of the JPEG that stands in the page for a PNG of photographs, which stays beside it: a fifth of the size."""


def html(result: CrossValidation, pictures: Mapping[str, bytes]) -> str:
    """The page; `pictures` are PNG files by name, and those missing are named in it."""
    context: dict[str, Any] = {
        "result": result,
        "setting": setting(result),
        "header": table_header(result),
        "rows": table_rows(result),
        "paper": paper_row(result),
        "beside_paper": beside_paper(result),
        "no_paper_row": NO_PAPER_ROW,
        "facts": facts(result),
        "config": json.dumps(result.config, indent=2, sort_keys=True, default=str),
        "margin": _margin(result),
        "chosen_on_test_note": CHOSEN_ON_TEST_NOTE,
        "inline": inline_pictures(pictures),
        "drawn": pictures,
        "in_percent": in_percent,
        "interval_text": interval_text,
        "percent": percent,
        "sections": sections,
        "tables": [(heading, text, table) for heading, text, of in sections.SECTIONS if (table := of(result))],
        "features": sections.feature_table(result),
        "energies": [shown for rank in sections.TYPICAL for shown in sections.ranked(result, rank) if shown[1].energy],
    }
    return rendered("report.html.j2", context)


def inline_pictures(pictures: Mapping[str, bytes]) -> Callable[..., str | None]:
    """For a template: a picture by its name as a data URI, None for one that is not there; photos as JPEG."""

    def inline(name: str, photo: bool = False) -> str | None:
        data = pictures.get(name)
        if data is None:
            return None
        kind, data = ("jpeg", _jpeg(data)) if photo else ("png", data)
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    return inline


def _jpeg(png: bytes) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(file, format="JPEG", quality=PHOTO_QUALITY, subsampling=0)
    return file.getvalue()


def _margin(result: CrossValidation) -> tuple[float, str] | None:
    """By how many points the trained mean exceeds the best baseline's mean, and which that is."""
    means = {key: mean for key in BASELINES if (mean := result.baseline_miou(key)) is not None}
    if not means:
        return None
    best = max(means, key=lambda key: means[key])
    return 100 * (result.mean_miou - means[best]), LABELS[best]
