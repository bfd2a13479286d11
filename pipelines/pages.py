"""Pages from the templates beside this file: HTML, and Markdown (`.md.j2`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.markdown import escaped


def rendered(template: str, context: Mapping[str, Any]) -> str:
    """The page. Text is escaped for its format, and a name that the context lacks is an error."""
    import jinja2

    markdown = template.endswith(".md.j2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=not markdown,
        finalize=_markdown if markdown else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def plain(text: str) -> str:
    """Text that a template takes as it is: its marks are meant."""
    from markupsafe import Markup

    return Markup(text)


def _markdown(value: object) -> str:
    from markupsafe import Markup

    return value if isinstance(value, Markup) else escaped(str(value))
