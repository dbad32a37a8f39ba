"""What all plots share: colours, style, lines, phase marks, legends, and SVG and PNG files.

The colours are those of Okabe and Ito, which colour-blind people can tell apart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipelines.files import Row, atomic_write, write_text

Points = list[tuple[float, float]]
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8A8A8A"
MAX_POINTS = 500
# Inches, at 72 units each: narrow, so that text stays legible on a phone.
WIDTH, HEIGHT = 4.7, 3.1
SMALL = 9.5
"""Points of the text in legends and marks."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastimagenet",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "axes.edgecolor": "#777777",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
LEGEND: Row = {
    "fontsize": SMALL, "columnspacing": 1.0, "handlelength": 1.3, "handletextpad": 0.5,
    "borderpad": 0.1, "frameon": False, "alignment": "left", "title_fontsize": SMALL,
}  # fmt: skip
OUTCOMES = {
    "loss": ("training loss (nats)", 1),
    "val_loss": ("validation loss (nats)", 1),
    "top1": ("top-1 accuracy (%)", 100),
    "top5": ("top-5 accuracy (%)", 100),
}
"""Fields of a record: label of the axis and factor to its unit, in the order of `stack`."""


def finite(value: object) -> TypeGuard[float]:
    """Tell whether `value` is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def thin(points: Points) -> Points:
    """Reduce to at most MAX_POINTS points, the medians of groups of neighbours.

    Every n-th point alone would show the slow first steps of epochs far too often or never.
    """
    size = -(-len(points) // MAX_POINTS) or 1
    groups = (points[first : first + size] for first in range(0, len(points), size))
    return [(median(x for x, _ in group), median(y for _, y in group)) for group in groups]


def thousands(value: float, _: int) -> str:
    """Format the label of a tick: "1,200"."""
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


class NotebookFigure(Figure):
    """A figure that a notebook shows by itself, without pyplot."""

    def _repr_svg_(self) -> str:
        text = _svg_file(self, "white")
        return text[text.index("<svg") :]


def with_text(text: str, figure: Figure) -> str:
    """Return lines of text and a figure below them, as a notebook shows them."""
    svg_file = _svg_file(figure, "white")
    return f"<pre>{escape(text)}</pre>{svg_file[svg_file.index('<svg') :]}"


def new_figure(
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (WIDTH, HEIGHT),
    sharex: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Create a figure of `size` inches; return it and its axes, row by row."""
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
        return figure, list(axes.flat)


def stack(without_top5: bool) -> tuple[Figure, dict[str, Axes]]:
    """Create axes for OUTCOMES by field, one below the other over a shared x axis."""
    fields = [field for field in OUTCOMES if field != "top5" or not without_top5]
    figure, axes = new_figure(len(fields), size=(WIDTH, 1.8 * len(fields)), sharex=True)
    for panel, field in zip(axes, fields, strict=True):
        panel.set_ylabel(OUTCOMES[field][0])
    figure.align_ylabels(axes)
    return figure, dict(zip(fields, axes, strict=True))


def draw_line(axes: Axes, points: Points, **style: Any) -> None:
    """Draw a line through the points, if there are any."""
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def mark_phases(
    axes: Axes, phases: list[Row], starts: Iterable[float | None], end: float, names: bool = True
) -> None:
    """Draw a dotted line where a phase starts, and its image size above if there is room.

    A start of None: the run did not get there.
    """
    reached = [(p, start) for p, start in zip(phases, starts, strict=True) if start is not None]
    ends = [*(start for _, start in reached[1:]), end]
    for (phase, start), stop in zip(reached, ends, strict=False):
        if start:
            axes.axvline(start, color="#777777", linestyle=":", linewidth=1)
        if names and len(phases) > 1 and stop - start > 0.16 * end:
            look: Row = {"ha": "center", "va": "bottom", "fontsize": SMALL, "color": "#555555"}
            middle, above = (start + stop) / 2, axes.get_xaxis_transform()
            axes.text(middle, 1.01, f"{phase['image_size']} px", transform=above, **look)


def with_legend(figure: Figure, **style: Any) -> Figure:
    """Add a legend of the labels of the first axes above the figure, if there are any."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        look = LEGEND | {"ncols": 4} | style
        figure.legend(handles, labels, loc="outside upper left", **look)
    return figure


def svg(figure: Figure, name: str) -> str:
    """Render an `<svg>` element without a fixed size, its ids made unique by `name`."""
    text = _svg_file(figure, "none")
    text = text[text.index("<svg") :]
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)


def write_files(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.svg and NAME.png (300 pixels per inch) on white; return both paths."""
    vector, pixels = folder / f"{name}.svg", folder / f"{name}.png"
    write_text(vector, _svg_file(figure, "white"))
    with atomic_write(pixels) as beside, matplotlib.rc_context(STYLE):
        figure.savefig(beside, format="png", dpi=300, facecolor="white")
    return [vector, pixels]


def _svg_file(figure: Figure, background: str) -> str:
    """Render on a colour, or on "none"."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_facecolor(background)
    with matplotlib.rc_context(STYLE):
        # `savefig` would draw everything twice: at first to lay it out, which drawing does anyway.
        FigureCanvasSVG(figure).print_svg(text, metadata=nothing)
    return text.getvalue()
