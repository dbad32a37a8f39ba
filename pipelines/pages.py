"""Render the HTML pages: self-contained files from templates that extend base.html.jinja."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.formats import duration, number, percent

if TYPE_CHECKING:
    from PIL import Image


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


def framed(page: Path) -> str | None:
    """Return a page of ours, which needs no other file, as a notebook shows it; None without it."""
    if not page.exists():
        return None
    text = escape(page.read_text(encoding="utf-8"))
    return f'<iframe srcdoc="{text}" style="width: 100%; height: 640px; border: 0"></iframe>'


def inline(image: Image.Image) -> str:
    """Return the image, as a PNG, as the address of an `<img>`."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
