"""The plots of learning-rate sweeps, laid over one another.

Losses and accuracies are those of the records that `sweep.shown` keeps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fastimagenet.lr_finder.analysis import (
    Sweep,
    SweepRecord,
    best_sweep,
    in_words,
    labels,
    plateau,
    shown,
    smoothed,
    suggest,
)
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

COLOURS = (BLUE, VERMILLION, BLACK, ORANGE, GREEN, PURPLE, SKY, GREY)
DASHES = ("-", "--", "-.", ":")
MARKERS = ("", "o", "^", "x")
MARKS = {
    "valley": ("valley", "v"),
    "steepest": ("steepest", "D"),
    "minimum_10": ("minimum / 10", "s"),
}


def draw(sweeps: Sequence[Sweep]) -> dict[str, Figure]:
    """The figures by name; none where no sweep has records to show."""
    if not any(map(shown, sweeps)):
        return {}
    plots: tuple[Callable[[Sequence[Sweep]], Figure], ...]
    plots = (loss_against_lr, stacked, rates, loss_against_iterations)
    return {plot.__name__: plot(sweeps) for plot in plots}


def write_figures(folder: Path, figures: dict[str, Figure]) -> list[Path]:
    """NAME.svg and NAME.png of each figure of `draw` into `folder`; returns their paths.

    Each file appears whole or not at all.
    """
    return [path for name, figure in figures.items() for path in write_files(figure, folder, name)]


def loss_against_lr(sweeps: Sequence[Sweep]) -> Figure:
    """Smoothed training loss against LR, the plateaus, and the best sweep's suggestions."""
    figure, (axes,) = new_figure(size=(5.2, 3.6))
    for sweep, look in zip(sweeps, _looks(sweeps), strict=True):
        found = plateau(sweep)
        if found:
            inside = [r for r in shown(sweep) if found.low_lr <= r.lr <= found.high_lr]
            band: Row = {"linewidth": 7, "alpha": 0.25, "solid_capstyle": "butt"}
            draw_line(axes, _points(inside, "lr", "loss"), color=look["color"], **band)
    _draw_losses(axes, sweeps, "lr")
    _lr_axis(axes, sweeps)
    best = best_sweep(sweeps)
    if best:
        _mark_suggestions(axes, best, sweeps)
    return _with_names(figure, sweeps)


def stacked(sweeps: Sequence[Sweep]) -> Figure:
    """Training loss, validation loss, top-1 and top-5 against LR, one below the other.

    Validation is averaged as the training loss is; what each batch gave is faint, and drawn of
    the best sweep alone.
    """
    figure, axes = stack()
    best = best_sweep(sweeps) or sweeps[0]
    _draw_losses(axes["loss"], sweeps, "lr")
    for key in ("val_loss", "top1", "top5"):
        place, scale, curves = axes[key], OUTCOMES[key][1], []
        for sweep, look in zip(sweeps, _looks(sweeps), strict=True):
            records = [r for r in sweep.records if finite(getattr(r, key))]
            averages = dict(zip(records, smoothed(getattr(r, key) for r in records), strict=True))
            curve = [(r.lr, scale * averages[r]) for r in shown(sweep) if finite(averages.get(r))]
            raw = _points(shown(sweep), "lr", key, scale) if sweep is best else []
            draw_line(place, raw, color=look["color"], alpha=0.4, linewidth=0.7)
            draw_line(place, curve, **look)
            curves += [[value for _, value in points] for points in (raw, curve)]
        if key == "val_loss":
            _cut(place, curves)
    _lr_axis(axes["top5"], sweeps)
    return _with_names(figure, sweeps)


def rates(sweeps: Sequence[Sweep]) -> Figure:
    """LR and momentum of all records against iterations, side by side; grey: of several sweeps."""
    figure, axes = new_figure(columns=2, size=(WIDTH, 2.8))
    longest_first = sorted(
        zip(sweeps, _looks(sweeps), strict=True), key=lambda pair: -len(pair[0].records)
    )
    for place, key in zip(axes, ("lr", "momentum"), strict=True):
        drawn: list[Points] = []
        for sweep, look in longest_first:
            points = _points(sweep.records, "iteration", key)
            if any(points == other[: len(points)] for other in drawn):
                continue
            alike = [_points(other.records, "iteration", key) for other in sweeps]
            if sum(other == points[: len(other)] for other in alike) > 1:
                look = look | {"color": GREY, "linestyle": "-"}
            draw_line(place, points, **look)
            drawn.append(points)
        _iteration_axis(place, 4)
        place.set_ylabel("momentum" if key == "momentum" else _lr_name(sweeps))
    if not sweeps[0].linear:
        axes[0].set_yscale("log")
        _plain_decades(axes[0].yaxis, [r.lr for sweep in sweeps for r in sweep.records])
    return figure


def loss_against_iterations(sweeps: Sequence[Sweep]) -> Figure:
    """Smoothed training loss against iterations."""
    figure, (axes,) = new_figure()
    _draw_losses(axes, sweeps, "iteration")
    _iteration_axis(axes)
    return _with_names(figure, sweeps)


def _points(records: Iterable[SweepRecord], x: str, y: str, scale: float = 1) -> Points:
    return [
        (getattr(record, x), scale * getattr(record, y))
        for record in records
        if finite(getattr(record, y))
    ]


def _looks(sweeps: Sequence[Sweep]) -> list[Row]:
    """Colour, dashes and dots of each sweep's lines: apart in grey, too. The best is thick."""
    best = best_sweep(sweeps)
    in_turn = itertools.count(0 if best is None else 1)
    looks = []
    for sweep in sweeps:
        place = 0 if sweep is best else next(in_turn)
        look: Row = {"linewidth": 2.6 if sweep is best else 1.5, "markersize": 3.5}
        look["color"] = COLOURS[place % len(COLOURS)]
        look["linestyle"] = DASHES[place % len(DASHES)]
        if place >= len(DASHES):
            look |= {"marker": MARKERS[place // len(DASHES) % len(MARKERS)], "markevery": 0.1}
        elif len(shown(sweep)) == 1:
            look["marker"] = "o"
        looks.append(look)
    return looks


def _draw_losses(axes: Axes, sweeps: Sequence[Sweep], x: str) -> None:
    curves = []
    for sweep, look in zip(sweeps, _looks(sweeps), strict=True):
        points = _points(shown(sweep), x, "loss")
        draw_line(axes, points, **look)
        curves.append([loss for _, loss in points])
    _cut(axes, curves)
    axes.set_ylabel(OUTCOMES["loss"][0])


def _cut(axes: Axes, curves: list[list[float]]) -> None:
    """End the axis not far above where the curves begin: one that explodes leaves the plot."""
    values = [value for curve in curves for value in curve]
    if not values:
        return
    low = min(values)
    high = max(median(curve[0] for curve in curves if curve), median(values))
    top = high + 0.25 * (high - low)
    if low < top < max(values):
        axes.set_ylim(low - 0.06 * (top - low), top)


def _lr_axis(axes: Axes, sweeps: Sequence[Sweep]) -> None:
    axes.set_xlabel(_lr_name(sweeps))
    if not sweeps[0].linear:
        axes.set_xscale("log")
        _plain_decades(axes.xaxis, [record.lr for sweep in sweeps for record in shown(sweep)])


def _lr_name(sweeps: Sequence[Sweep]) -> str:
    return "learning rate" if sweeps[0].linear else "learning rate (log axis)"


def _plain_decades(axis: Axis, values: list[float]) -> None:
    """Labels such as 1e-4, 0.001, 0.01; between the powers of ten, too, where there are few."""
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
    """A shape where each suggestion lies on its curve, and a legend with their LRs below."""
    suggestions, records = suggest(best), shown(best)
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
    """The same figure, higher by a legend of what tells the sweeps apart."""
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
