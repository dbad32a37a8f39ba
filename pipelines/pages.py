"""Render the HTML pages: self-contained files from templates that extend base.html.jinja."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.formats import duration, number, percent


def render(template: Path, **values: Any) -> str:
    """Render a template; values are escaped unless they are Markup, and a missing one raises.

    Templates have the filters of `pipelines.formats`: percent, duration, number.
    """
    templates = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": percent, "duration": duration, "number": number}
    return templates.get_template(template.name).render(values)
