"""Plots of learning-rate sweeps, laid over one another.

Losses and accuracies are those of the records that `Sweep.shown` returns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fastimagenet.lr_finder.analysis import best_sweep, in_words, labels
from fastimagenet.lr_finder.sweep import SKIP_FIRST, SKIP_LAST, Sweep, SweepRecord
from fastimagenet.lr_finder.sweep import smoothed as averaged
from fastimagenet.report.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LEGEND,
    ORANGE,
    OUTCOMES,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    Points,
    draw_line,
    finite,
    new_figure,
    stack,
    thousands,
    write_files,
)
from pipelines.files import Row
from pipelines.formats import plain

Shown = tuple[SweepRecord, ...]
COLOURS = (BLUE, VERMILLION, BLACK, ORANGE, GREEN, PURPLE, SKY, GREY)
DASHES = ("-", "--", "-.", ":")
MARKERS = ("", "o", "^", "x")
MARKS = {
    "valley": ("valley", "v"),
    "steepest": ("steepest", "D"),
    "minimum_10": ("minimum / 10", "s"),
}


def draw(sweeps: Sequence[Sweep]) -> dict[str, Figure]:
    """Draw the figures, by name; none where no sweep has records to show."""
    if not any(sweep.shown() for sweep in sweeps):
        return {}
    return {
        "loss_against_lr": loss_against_lr(sweeps),
        "stacked": stacked(sweeps),
        "rates": rates(sweeps),
        "loss_against_iterations": loss_against_iterations(sweeps),
    }


def write_figures(folder: Path, figures: dict[str, Figure]) -> list[Path]:
    """Write NAME.svg and NAME.png of each figure into `folder` and return their paths."""
    return [path for name, figure in figures.items() for path in write_files(figure, folder, name)]


def loss_against_lr(sweeps: Sequence[Sweep]) -> Figure:
    """Draw smoothed training loss against LR, plateaus, and the best sweep's suggestions."""
    figure, (axes,) = new_figure(size=(5.2, 3.6))
    for sweep, look in zip(sweeps, _looks(sweeps), strict=True):
        if found := sweep.plateau:
            inside = [r for r in sweep.shown() if found.low_lr <= r.lr <= found.high_lr]
            band: Row = {"linewidth": 7, "alpha": 0.25, "solid_capstyle": "butt"}
            draw_line(axes, _points(inside, "lr", "loss"), color=look["color"], **band)
    shown = [sweep.shown() for sweep in sweeps]
    _draw_losses(axes, sweeps, shown, "lr")
    _lr_axis(axes, sweeps, shown)
    if best := best_sweep(sweeps):
        _mark_suggestions(axes, best, sweeps)
    return _with_names(figure, sweeps)


def stacked(
    sweeps: Sequence[Sweep],
    skip_first: int = SKIP_FIRST,
    skip_last: int = SKIP_LAST,
    smoothed: bool = True,
) -> Figure:
    """Draw training loss, validation loss and accuracies against LR, one below the other.

    `smoothed`: validation is averaged as the training loss is; the value of each batch is faint,
    and drawn for the best sweep alone. Otherwise the values of the batches are drawn as they are.
    """
    best = best_sweep(sweeps) or sweeps[0]
    shown = [sweep.shown(skip_first, skip_last) for sweep in sweeps]
    figure, axes = stack(without_top5=not any(finite(r.top5) for rows in shown for r in rows))
    _draw_losses(axes["loss"], sweeps, shown, "lr")
    for key in list(axes)[1:]:
        curves: list[Points] = []
        for sweep, records, look in zip(sweeps, shown, _looks(sweeps), strict=True):
            raw = _points(records, "lr", key)
            if smoothed and sweep is best:
                draw_line(axes[key], raw, color=look["color"], alpha=0.4, linewidth=0.7)
                curves.append(raw)
            curve = _averages(sweep, records, key) if smoothed else raw
            draw_line(axes[key], curve, **look)
            curves.append(curve)
        if key == "val_loss":
            _cut(axes[key], curves)
    _lr_axis(list(axes.values())[-1], sweeps, shown)
    return _with_names(figure, sweeps)


def rates(sweeps: Sequence[Sweep]) -> Figure:
    """Draw LR and momentum against iterations, side by side; grey where sweeps share them."""
    figure, axes = new_figure(columns=2, size=(WIDTH, 2.8))
    longest_first = sorted(
        zip(sweeps, _looks(sweeps), strict=True), key=lambda pair: -len(pair[0].records)
    )
    for panel, key in zip(axes, ("lr", "momentum"), strict=True):
        drawn: list[Points] = []
        for sweep, look in longest_first:
            points = _points(sweep.records, "iteration", key)
            if any(points == other[: len(points)] for other in drawn):
                continue
            alike = [_points(other.records, "iteration", key) for other in sweeps]
            if sum(other == points[: len(other)] for other in alike) > 1:
                look = look | {"color": GREY, "linestyle": "-"}
            draw_line(panel, points, **look)
            drawn.append(points)
        _iteration_axis(panel, 4)
        panel.set_ylabel("momentum" if key == "momentum" else _lr_name(sweeps))
    if not sweeps[0].linear:
        axes[0].set_yscale("log")
        _plain_decades(axes[0].yaxis, [r.lr for sweep in sweeps for r in sweep.records])
    return figure


def loss_against_iterations(sweeps: Sequence[Sweep]) -> Figure:
    """Draw smoothed training loss against iterations."""
    figure, (axes,) = new_figure()
    _draw_losses(axes, sweeps, [sweep.shown() for sweep in sweeps], "iteration")
    _iteration_axis(axes)
    return _with_names(figure, sweeps)


def _points(records: Iterable[SweepRecord], x: str, y: str) -> Points:
    """Take two fields of the records, `y` in the unit of its axis, where it is finite."""
    scale = OUTCOMES[y][1] if y in OUTCOMES else 1
    values = ((getattr(record, x), getattr(record, y)) for record in records)
    return [(at, scale * value) for at, value in values if finite(value)]


def _averages(sweep: Sweep, records: Iterable[SweepRecord], y: str) -> Points:
    """Average a field from the sweep's first record on; return the points at `records`."""
    points = _points(sweep.records, "lr", y)
    averages = averaged(value for _, value in points)
    kept = {record.lr for record in records}
    return [
        (lr, average)
        for (lr, _), average in zip(points, averages, strict=True)
        if lr in kept and finite(average)
    ]


def _looks(sweeps: Sequence[Sweep]) -> list[Row]:
    """Choose colour, dashes and markers of each sweep, distinct in grey too; the best is thick."""
    best = best_sweep(sweeps)
    in_turn = itertools.count(0 if best is None else 1)
    looks = []
    for sweep in sweeps:
        index = 0 if sweep is best else next(in_turn)
        look: Row = {"linewidth": 2.6 if sweep is best else 1.5, "markersize": 3.5}
        look["color"] = COLOURS[index % len(COLOURS)]
        look["linestyle"] = DASHES[index % len(DASHES)]
        if index >= len(DASHES):
            look |= {"marker": MARKERS[index // len(DASHES) % len(MARKERS)], "markevery": 0.1}
        elif len(sweep.shown()) == 1:
            look["marker"] = "o"
        looks.append(look)
    return looks


def _draw_losses(axes: Axes, sweeps: Sequence[Sweep], shown: Sequence[Shown], x: str) -> None:
    curves = [_points(records, x, "loss") for records in shown]
    for curve, look in zip(curves, _looks(sweeps), strict=True):
        draw_line(axes, curve, **look)
    _cut(axes, curves)
    axes.set_ylabel(OUTCOMES["loss"][0])


def _cut(axes: Axes, curves: list[Points]) -> None:
    """End the axis a little above the start of the curves: one that explodes leaves the plot."""
    values = [value for curve in curves for _, value in curve]
    if not values:
        return
    low = min(values)
    high = max(median(curve[0][1] for curve in curves if curve), median(values))
    top = high + 0.25 * (high - low)
    if low < top < max(values):
        axes.set_ylim(low - 0.06 * (top - low), top)


def _lr_axis(axes: Axes, sweeps: Sequence[Sweep], shown: Sequence[Shown]) -> None:
    axes.set_xlabel(_lr_name(sweeps))
    if not sweeps[0].linear:
        axes.set_xscale("log")
        _plain_decades(axes.xaxis, [record.lr for records in shown for record in records])


def _lr_name(sweeps: Sequence[Sweep]) -> str:
    return "learning rate" if sweeps[0].linear else "learning rate (log axis)"


def _plain_decades(axis: Axis, values: list[float]) -> None:
    """Label powers of ten as 1e-4, 0.001, 0.01, and values between them if these are few."""
    span = max(values) / min(values)
    powers = LogLocator(subs=(1,) if span > 30 else (1, 2, 5))
    level = MaxNLocator(5, steps=[1, 2, 5, 10])
    axis.set_major_locator(level if 1 < span < 5 else powers)
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_formatter(NullFormatter())


def _iteration_axis(axes: Axes, most_ticks: int = 10) -> None:
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(most_ticks, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))


def _mark_suggestions(axes: Axes, best: Sweep, sweeps: Sequence[Sweep]) -> None:
    """Mark each suggestion on its curve by a shape; list their LRs in a legend below."""
    suggestions, records = best.suggestions, best.shown()
    assert suggestions is not None, "a sweep with a plateau has suggestions"
    lrs, losses = [r.lr for r in records], [r.loss for r in records]
    handles = []
    for key, (name, shape) in MARKS.items():
        lr = getattr(suggestions, key)
        loss = float(np.interp(math.log(lr), np.log(lrs), losses))
        style: Row = {"marker": shape, "markersize": 9, "markeredgewidth": 1.6}
        style |= {"color": BLACK, "fillstyle": "none", "linestyle": "none", "zorder": 5}
        handles += axes.plot(lr, loss, label=f"{name}: {plain(lr, 3)}", **style)
    figure = axes.get_figure(root=True)
    assert figure is not None
    title = f"learning rates suggested with {in_words(best, sweeps)}"
    figure.legend(handles=handles, loc="outside lower left", ncols=3, title=title, **LEGEND)


def _with_names(figure: Figure, sweeps: Sequence[Sweep]) -> Figure:
    """Add a legend of what distinguishes the sweeps, and the height it needs."""
    if len(sweeps) < 2:
        return figure
    title, names = labels(sweeps)
    handles = [Line2D([], [], **look) for look in _looks(sweeps)]
    columns = max(1, int(72 * figure.get_figwidth() / (40 + 5 * max(map(len, names)))))
    look = LEGEND | {"handlelength": 2.6, "ncols": columns, "title": title}
    figure.legend(handles, names, loc="outside upper left", **look)
    lines = 1 + math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * lines)
    return figure
