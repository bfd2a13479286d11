"""HTML pages from the templates beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def rendered(template: str, context: Mapping[str, Any]) -> str:
    """The page. Text is escaped, and a name that the context lacks is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)
