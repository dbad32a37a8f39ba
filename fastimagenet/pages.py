"""The pages of runs, sweeps and comparisons: how their templates are filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastimagenet.formats import duration, number, percent
from pipelines.pages import page_templates


def render(template: str, folder: Path = Path(__file__).parent, **values: Any) -> str:
    """The page; every value is escaped unless it is Markup, and each has to be given."""
    templates = page_templates(folder)
    templates.filters |= {"percent": percent, "duration": duration, "number": number}
    return templates.get_template(template).render(values)
