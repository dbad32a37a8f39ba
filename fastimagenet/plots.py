"""The plots of a run's report, each as the text of one inline `<svg>`.

Every function takes rows of `metrics.jsonl` and phases of `plan.json` and returns "" where there
is nothing to draw. Colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from statistics import median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Row = dict[str, Any]
Points = list[tuple[float, float]]

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8A8A8A"
TIME_COLOURS = {
    "start_up": SKY,
    "compile": PURPLE,
    "data_wait": VERMILLION,
    "compute": BLUE,
    "communication": ORANGE,
    "evaluation": GREEN,
    "checkpoint": YELLOW,
    "other": GREY,
}
MAX_POINTS = 500
# Widths and heights in inches at 72 units each: narrow, so that text stays legible on a phone.
WIDTH, HEIGHT = 4.7, 3.1
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


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that suits a span of time, and its length in seconds."""
    if seconds < 180:
        return "s", 1.0
    return ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)


def lost_epoch(epochs: list[Row]) -> int | None:
    """The first epoch, from 1, whose training loss is NaN or infinite (or null, in strict JSON)."""
    for row in epochs:
        if "train_loss" in row and not _finite(row["train_loss"]):
            return int(row["epoch"]) + 1
    return None


def accuracy(epochs: list[Row], phases: list[Row], target: tuple[str, float] | None) -> str:
    """Accuracy in percent against training time, with the target line."""
    evaluated = [row for row in epochs if _finite(row.get("top1"))]
    if not evaluated:
        return ""
    unit, length = time_unit(epochs[-1]["train_seconds"])
    figure, (axes,) = _figure()
    styles = (
        ("top1", "top-1", {"color": BLUE, "marker": "o"}),
        ("top5", "top-5", {"color": SKY, "marker": "s"}),
        ("tta_top1", "TTA top-1", {"color": ORANGE, "marker": "D", "linestyle": "none"}),
    )
    for key, label, style in styles:
        points = [
            (row["train_seconds"] / length, 100 * row[key])
            for row in evaluated
            if _finite(row.get(key))
        ]
        _line(axes, points, label=label, markersize=4 if len(points) <= 40 else 0, **style)
    if target:
        metric, value = target
        name = {"top1": "top-1", "top5": "top-5"}.get(metric, metric)
        label = f"target {100 * value:g} % {name}"
        line = axes.axhline(100 * value, color=VERMILLION, linestyle="--", linewidth=1.4)
        line.set_label(label.replace("$", ""))
    axes.set_xlim(left=0)
    ends = {row["epoch"] + 1: row["train_seconds"] / length for row in epochs}
    starts = [ends.get(p["first_epoch"], 0.0 if not p["first_epoch"] else None) for p in phases]
    _mark_phases(axes, phases, starts, epochs[-1]["train_seconds"] / length)
    axes.set(xlabel=f"training time ({unit})", ylabel="validation accuracy (%)")
    return _svg(figure, "accuracy")


def losses(steps: list[Row], epochs: list[Row], phases: list[Row]) -> str:
    """Loss of each logged step, of each epoch and on the validation set, against epochs."""
    single = [
        (done, row["loss"])
        for row in steps
        if _finite(row.get("loss")) and (done := _epochs_done(row["step"], phases)) is not None
    ]
    training, validation = (
        [(row["epoch"] + 1, row[key]) for row in epochs if _finite(row.get(key))]
        for key in ("train_loss", "val_loss")
    )
    if not single + training + validation:
        return ""
    figure, (axes,) = _figure()
    _line(axes, _thin(single), label="step", color="#B9C6D3", linewidth=1)
    marker = {"marker": "o", "markersize": 3 if len(epochs) <= 40 else 0, "clip_on": False}
    _line(axes, training, label="training", color=BLUE, **marker)
    _line(axes, validation, label="validation", color=ORANGE, **marker)
    values = sorted(value for _, value in single + training + validation)
    if values[0] > 0 and values[-1] > 30 * values[len(values) // 2]:
        axes.set_yscale("log")
    lost = lost_epoch(epochs)
    if lost:
        edge = axes.axvline(lost, color=VERMILLION, linestyle="--", linewidth=1.4)
        edge.set_label(f"not finite: epoch {lost}")
    _epoch_axis(axes, phases)
    axes.set(ylabel="loss")
    return _svg(figure, "losses")


def schedule(steps: list[Row], phases: list[Row]) -> str:
    """Learning rate and momentum of each logged step."""
    if not any(_finite(row.get("lr")) for row in steps):
        return ""
    figure, axes = _figure(2, sharex=True)
    for place, key, name, colour in zip(
        axes, ("lr", "momentum"), ("learning rate", "momentum"), (BLUE, GREEN), strict=True
    ):
        points = [(row["step"], row[key]) for row in steps if _finite(row.get(key))]
        _line(place, _thin(points), color=colour)
        place.set_ylabel(name)
        place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _mark_phases(place, phases, *_step_edges(phases), names=key == "lr")
    axes[0].set_ylim(0, 1.1 * max(row["lr"] for row in steps if _finite(row.get("lr"))))
    _step_axis(axes[1], phases)
    return _svg(figure, "schedule")


def sizes(epochs: list[Row], phases: list[Row]) -> str:
    """Image size and batch size of each epoch."""
    if not epochs:
        return ""
    figure, axes = _figure(2, sharex=True)
    labels = {"image_size": "image size (px)", "batch_size": "batch per process"}
    for place, (key, label), colour in zip(axes, labels.items(), (PURPLE, VERMILLION), strict=True):
        points = [(row["epoch"] + end, row[key]) for row in epochs for end in (0, 1)]
        _line(place, points, color=colour, linewidth=2.4)
        largest = max(value for _, value in points)
        ticks = [largest]
        for value in sorted({value for _, value in points}, reverse=True):
            if min(value, ticks[-1] - value) > 0.2 * largest:
                ticks.append(value)
        place.set_ylim(0, 1.15 * largest)
        place.set_yticks([0, *ticks])
        place.set_ylabel(label)
    _epoch_axis(axes[1], phases, names=False)
    return _svg(figure, "sizes")


def throughput(steps: list[Row], phases: list[Row]) -> str:
    """Images per second of each logged step, all GPUs together."""
    points = [
        (row["step"], row["images_per_sec"]) for row in steps if _finite(row.get("images_per_sec"))
    ]
    if not points:
        return ""
    figure, (axes,) = _figure()
    dots = {"marker": "o", "markersize": 2, "linewidth": 1}
    _line(axes, _thin(points), color=BLUE, **dots)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    _mark_phases(axes, phases, *_step_edges(phases))
    _step_axis(axes, phases)
    axes.set(ylabel="images/s in total")
    return _svg(figure, "throughput")


def epoch_seconds(epochs: list[Row]) -> str:
    """Seconds of each epoch: training, waiting for data taken out of it, and evaluation."""
    if not epochs:
        return ""
    figure, (axes,) = _figure()
    before: Row = {"train_seconds": 0.0, "eval_seconds": 0.0, "data_wait_seconds": 0.0}
    parts: dict[str, list[float]] = {"computing": [], "waiting for data": [], "evaluation": []}
    for row in epochs:
        wait = row["data_wait_seconds"] - before["data_wait_seconds"]
        train = row["train_seconds"] - before["train_seconds"]
        parts["computing"].append(max(0.0, train - wait))
        parts["waiting for data"].append(wait)
        parts["evaluation"].append(max(0.0, row["eval_seconds"] - before["eval_seconds"]))
        before = row
    numbers = [row["epoch"] + 1 for row in epochs]
    bottom = [0.0] * len(epochs)
    for (name, values), key in zip(
        parts.items(), ("compute", "data_wait", "evaluation"), strict=True
    ):
        axes.bar(numbers, values, 0.8, bottom, label=name, color=TIME_COLOURS[key])
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(numbers) <= 4:
        axes.set_xticks(numbers)
    axes.set(xlabel="epoch", ylabel="seconds", xlim=(0.4, max(numbers[-1], 4) + 0.6))
    axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.grid(visible=False, axis="x")
    return _svg(figure, "epoch_seconds")


def time_split(seconds: Row) -> str:
    """One bar over the whole wall time; parts above 10 % carry their share, and their name
    where it fits."""
    parts = {key: float(value) for key, value in seconds.items() if value and value > 0}
    total = sum(parts.values())
    if not total:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8), layout="constrained")
        axes = figure.subplots()
    left = 0.0
    for key, value in parts.items():
        share = 100 * value / total
        colour = TIME_COLOURS.get(key, GREY)
        axes.barh(0, share, left=left, color=colour, edgecolor="white", linewidth=1)
        words = key.split("_")
        # A letter takes up to 2 % of the bar's width.
        lines = [*(words if share > 2 * max(map(len, words)) else []), f"{share:.0f} %"]
        if share > 10:
            ink = "white" if colour == BLUE else "black"
            place: Row = {"ha": "center", "va": "center", "color": ink, "fontsize": 9.5}
            axes.text(left + share / 2, 0, "\n".join(lines), parse_math=False, **place)
        left += share
    axes.set(xlim=(0, 100), ylim=(-0.4, 0.4))
    axes.set_axis_off()
    return _svg(figure, "time_split")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thin(points: Points) -> Points:
    """At most MAX_POINTS: the medians of neighbours, since every n-th point alone would show
    the first step of each epoch, always a slow one, far too often or never."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = (points[first : first + size] for first in range(0, len(points), size))
    return [(median(x for x, _ in group), median(y for _, y in group)) for group in groups]


def _thousands(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _figure(rows: int = 1, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        return figure, list(figure.subplots(rows, 1, sharex=sharex, squeeze=False)[:, 0])


def _line(axes: Axes, points: Points, **style: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _mark_phases(
    axes: Axes, phases: list[Row], starts: Iterable[float | None], end: float, names: bool = True
) -> None:
    """A dotted line where a phase begins, and its image size above the plot where there is room.

    None among `starts`: the run did not get there.
    """
    reached = [(p, start) for p, start in zip(phases, starts, strict=True) if start is not None]
    ends = [*(start for _, start in reached[1:]), end]
    for (phase, start), stop in zip(reached, ends, strict=False):
        if start:
            axes.axvline(start, color="#777777", linestyle=":", linewidth=1)
        if names and len(phases) > 1 and stop - start > 0.16 * end:
            place: Row = {"ha": "center", "va": "bottom", "fontsize": 9.5, "color": "#555555"}
            middle, above = (start + stop) / 2, axes.get_xaxis_transform()
            axes.text(middle, 1.01, f"{phase['image_size']} px", transform=above, **place)


def _step_edges(phases: list[Row]) -> tuple[list[float | None], float]:
    if not phases:
        return [], 0.0
    last = phases[-1]
    return [p["first_step"] for p in phases], (
        last["first_step"] + last["epochs"] * last["steps_per_epoch"]
    )


def _epochs_done(step: int, phases: list[Row]) -> float | None:
    """How many epochs lie before `step`, with a fraction."""
    for phase in reversed(phases):
        if step >= phase["first_step"]:
            return float(
                phase["first_epoch"] + (step - phase["first_step"]) / phase["steps_per_epoch"]
            )
    return None


def _epoch_axis(axes: Axes, phases: list[Row], names: bool = True) -> None:
    axes.set_xlabel("epochs done")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if phases:
        end = phases[-1]["first_epoch"] + phases[-1]["epochs"]
        axes.set_xlim(0, end)
        _mark_phases(axes, phases, [p["first_epoch"] for p in phases], end, names)


def _step_axis(axes: Axes, phases: list[Row]) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    if phases:
        axes.set_xlim(0, _step_edges(phases)[1])


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element without a fixed size, its ids made unique by `name`."""
    axes = figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside upper left", ncols=4, fontsize=9.5,
            columnspacing=1.0, handlelength=1.3, handletextpad=0.5, borderpad=0.1, frameon=False,
        )  # fmt: skip
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (?:width|height)="[0-9.]+pt"', "", svg, count=2)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
