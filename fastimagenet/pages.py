"""The HTML pages: templates that extend base.html.jinja, one self-contained file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastimagenet.formats import duration, number, percent


def render(template: str, **values: Any) -> str:
    """The page; every value is escaped unless it is Markup, and each has to be given."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration, "number": number}
    return environment.get_template(template).render(values)
