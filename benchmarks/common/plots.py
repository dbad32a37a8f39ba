"""The picture of several finished runs: validation accuracy and learning rate against steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fastimagenet.report.figures import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SMALL,
    VERMILLION,
    Points,
    draw_line,
    new_figure,
    svg,
    thin,
    thousands,
    with_legend,
)
from fastimagenet.report.plots import TIME_COLOURS
from pipelines.files import Row

LOOKS: list[dict[str, Any]] = [
    {"color": BLUE, "linestyle": "-"},
    {"color": ORANGE, "linestyle": (0, (4, 1.5))},
    {"color": GREEN, "linestyle": (0, (5, 1, 1, 1))},
    {"color": VERMILLION, "linestyle": (0, (9, 1.5))},
    {"color": PURPLE, "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    {"color": BLACK, "linestyle": (0, (1, 1))},
]
LABEL_HEIGHT, LABEL_WIDTH = 0.065, 0.16
"""Of a label at the end of a line, in heights and widths of the upper plot."""


def look(index: int) -> dict[str, Any]:
    """Return colour and style of the line of a run."""
    return LOOKS[index % len(LOOKS)]


@dataclass(frozen=True)
class Curve:
    """One run: `name` at the end of its line, `legend` above the picture."""

    name: str
    legend: str
    accuracy: list[Points]
    """(steps done, per cent) of each seed, at the same steps."""
    lr: Points
    """(steps done, learning rate)."""

    @property
    def mean(self) -> Points:
        """Point by point over the seeds."""
        return [
            (points[0][0], fmean(y for _, y in points))
            for points in zip(*self.accuracy, strict=True)
        ]


def accuracy_and_lr(curves: list[Curve]) -> Figure:
    """Plot accuracies, the mean over the seeds in front of each of them, and learning rates."""
    figure, (above, below) = new_figure(2, size=(6.6, 5.6), sharex=True)
    set_heights(above, (5, 2))
    looks = [look(index) for index in range(len(curves))]
    for curve, style in zip(curves, looks, strict=True):
        for points in curve.accuracy if len(curve.accuracy) > 1 else []:
            draw_line(above, points, color=style["color"], linewidth=0.8, alpha=0.35)
        draw_line(above, curve.mean, label=curve.legend, **style)
        draw_line(above, curve.mean[-1:], color=style["color"], marker="o", markersize=4)
        draw_line(below, thin(curve.lr), **style)
    last = max(curve.mean[-1][0] for curve in curves)
    above.set_xlim(0, last * (1 + LABEL_WIDTH / 2))
    label_ends(above, curves, looks)
    above.set_ylabel("validation top-1 (%)")
    below.set(xlabel="steps", ylabel="learning rate", ylim=(0, None))
    below.xaxis.set_major_formatter(FuncFormatter(thousands))
    figure.align_ylabels([above, below])
    return with_legend(figure, ncols=3, handlelength=2.6)


def set_heights(axes: Axes, ratios: tuple[float, ...]) -> None:
    """Set the heights of the rows of the figure that the axes are in."""
    grid = axes.get_gridspec()
    assert grid is not None
    grid.set_height_ratios(ratios)


def label_ends(axes: Axes, curves: list[Curve], looks: list[dict[str, Any]]) -> None:
    """Write name and last value over the end of each line, stacked where ends are near."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= min(high, 100)]
    step, width = LABEL_HEIGHT * (high - low), LABEL_WIDTH * axes.get_xlim()[1]
    # A label stands clear of the single seeds, too.
    tops = [points[-1] for curve in curves for points in curve.accuracy]
    ends = [
        (*curve.mean[-1], curve.name, look["color"])
        for curve, look in zip(curves, looks, strict=True)
    ]
    placed: list[tuple[float, float]] = []
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        near = [top for other, top in tops + placed if abs(other - x) < width]
        placed.append((x, max(near) + step))
        axes.text(
            *placed[-1], f"{name}: {y:.1f}", ha="center", va="center", fontsize=SMALL, color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    axes.set(ylim=(low, max(high, *(top + step for _, top in placed))), yticks=ticks)


def time_bars(axes: Axes, splits: Mapping[str, Mapping[str, float]], unit_seconds: float) -> None:
    """Draw a bar of seconds by part for each name, the first one on top; parts of 0 are left out.

    `unit_seconds`: length of the axis' unit.
    """
    longest = max(sum(split.values()) for split in splits.values())
    rows, left = range(len(splits)), [0.0] * len(splits)
    for part, colour in TIME_COLOURS.items():
        values = [split.get(part, 0.0) / unit_seconds for split in splits.values()]
        if max(values) > 0.001 * longest / unit_seconds:
            label = part.replace("_", " ")
            axes.barh(rows, values, 0.6, left, color=colour, label=label, edgecolor="white")
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(rows, list(splits))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.02 * max(left))


def svgs(figures: Mapping[str, Figure]) -> list[tuple[str, Markup]]:
    """Render figures for a page, each with its heading."""
    return [
        (heading, Markup(svg(figure, f"plot{index}")))
        for index, (heading, figure) in enumerate(figures.items())
    ]


def accuracy_points(epochs: list[Row]) -> Points:
    """Return (steps done, plain top-1 in per cent) of every evaluation."""
    return [(row["step"], 100 * row["top1"]) for row in epochs if row["top1"] is not None]


def lr_points(rates: list[Row]) -> Points:
    """Return (steps done, learning rate) of `Run.rates`."""
    return [(row["step"], row["lr"]) for row in rates]


def schedule_text(recipe: Row) -> str:
    """Name the schedule: use_clr_beta, or what there is in its place."""
    if recipe["schedule"] == "use_clr_beta":
        return f"1cycle ({', '.join(f'{value:g}' for value in recipe['use_clr_beta'])})"
    if recipe["schedule"] != "piecewise":
        return str(recipe["schedule"])
    end = recipe["lr_spans"][-1][1]
    parts = [
        f"x {start:g}" + (f" .. {stop:g}" if stop != start else "") + f" to {100 * last / end:g} %"
        for _, last, start, stop in recipe["lr_spans"]
    ]
    return ", ".join(parts)
