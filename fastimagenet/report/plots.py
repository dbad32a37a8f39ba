"""Plots of a run's report, each as the text of one inline `<svg>`.

Every function takes rows of `metrics.jsonl` and phases of `plan.json` and returns "" if there is
nothing to draw.
"""

from __future__ import annotations

from itertools import cycle
from statistics import median_high

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastimagenet.report.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    OUTCOMES,
    PURPLE,
    SKY,
    SMALL,
    VERMILLION,
    WIDTH,
    YELLOW,
    Points,
    draw_line,
    finite,
    mark_phases,
    new_figure,
    stack,
    svg,
    thin,
    thousands,
    with_legend,
)
from pipelines.files import Row
from pipelines.formats import time_unit

LAYERS = (ORANGE, PURPLE, VERMILLION, SKY, YELLOW)
"""Of the layer groups before the last."""


def lost_epoch(epochs: list[Row]) -> int | None:
    """Return the first epoch, from 1, whose training loss is NaN, infinite or null."""
    for row in epochs:
        if "train_loss" in row and not finite(row["train_loss"]):
            return int(row["epoch"]) + 1
    return None


def _points(rows: list[Row], key: str, scale: float = 1) -> Points:
    """Take a field against the step, where it is finite."""
    return [(row["step"], scale * row[key]) for row in rows if finite(row.get(key))]


def accuracy(epochs: list[Row], phases: list[Row], target: tuple[str, float] | None) -> str:
    """Draw accuracy in percent against training time, with the target line."""
    evaluated = [row for row in epochs if finite(row.get("top1"))]
    if not evaluated:
        return ""
    unit, length = time_unit(epochs[-1]["train_seconds"])
    figure, (axes,) = new_figure()
    styles = (
        ("top1", "top-1", {"color": BLUE, "marker": "o"}),
        ("top5", "top-5", {"color": SKY, "marker": "s"}),
        ("tta_top1", "TTA top-1", {"color": ORANGE, "marker": "D", "linestyle": "none"}),
    )
    for key, label, style in styles:
        points = [
            (row["train_seconds"] / length, 100 * row[key])
            for row in evaluated
            if finite(row.get(key))
        ]
        draw_line(axes, points, label=label, markersize=4 if len(points) <= 40 else 0, **style)
    if target:
        metric, value = target
        name = {"top1": "top-1", "top5": "top-5"}.get(metric, metric)
        label = f"target {100 * value:g} % {name}"
        line = axes.axhline(100 * value, color=VERMILLION, linestyle="--", linewidth=1.4)
        line.set_label(label.replace("$", ""))
    axes.set_xlim(left=0)
    ends = {row["epoch"] + 1: row["train_seconds"] / length for row in epochs}
    starts = [ends.get(p["first_epoch"], 0.0 if not p["first_epoch"] else None) for p in phases]
    mark_phases(axes, phases, starts, epochs[-1]["train_seconds"] / length)
    axes.set(xlabel=f"training time ({unit})", ylabel="validation accuracy (%)")
    return svg(with_legend(figure), "accuracy")


def losses(steps: list[Row], epochs: list[Row], phases: list[Row]) -> str:
    """Draw the loss of each logged step, of each epoch and on validation, against epochs."""
    single = [
        (done, row["loss"])
        for row in steps
        if finite(row.get("loss")) and (done := _epochs_done(row, phases)) is not None
    ]
    training, validation = (
        [(row["epoch"] + 1, row[key]) for row in epochs if finite(row.get(key))]
        for key in ("train_loss", "val_loss")
    )
    if not single + training + validation:
        return ""
    figure, (axes,) = new_figure()
    draw_line(axes, thin(single), label="step", color="#B9C6D3", linewidth=1)
    marker = {"marker": "o", "markersize": 3 if len(epochs) <= 40 else 0, "clip_on": False}
    draw_line(axes, training, label="training", color=BLUE, **marker)
    draw_line(axes, validation, label="validation", color=ORANGE, **marker)
    _log_if_spread(axes, [value for _, value in single + training + validation])
    lost = lost_epoch(epochs)
    if lost:
        edge = axes.axvline(lost, color=VERMILLION, linestyle="--", linewidth=1.4)
        edge.set_label(f"not finite: epoch {lost}")
    _epoch_axis(axes, phases)
    axes.set(ylabel="loss")
    return svg(with_legend(figure), "losses")


def outcomes(steps: list[Row], epochs: list[Row], phases: list[Row]) -> str:
    """Draw training loss, validation loss and accuracies against steps, as they were computed."""
    figure, axes = stack(without_top5=not any(finite(row.get("top5")) for row in epochs))
    colours = {"loss": BLUE, "val_loss": ORANGE, "top1": BLUE, "top5": SKY}
    for key in axes:
        scale = OUTCOMES[key][1]
        rows = steps if key == "loss" else epochs
        points = _points(rows, key, scale)
        marker: Row = {} if key == "loss" else {"marker": "o", "markersize": 3, "clip_on": False}
        draw_line(axes[key], thin(points), color=colours[key], **marker)
        _log_if_spread(axes[key], [value for _, value in points])
    if not any(panel.lines for panel in axes.values()):
        return ""
    _step_axis(list(axes.values()), phases)
    return svg(figure, "outcomes")


def schedule(rates: list[Row], phases: list[Row]) -> str:
    """Draw learning rate, one line a layer group, and momentum of each update."""
    lrs = _points(rates, "lr")
    if not lrs:
        return ""
    figure, axes = new_figure(2, sharex=True)
    by_group = list(zip(*(row.get("layer_lrs", ()) for row in rates), strict=True))
    if len(by_group) > 1:
        steps = [row["step"] for row in rates]
        for number, (values, colour) in enumerate(zip(by_group[:-1], cycle(LAYERS)), start=1):
            points = list(zip(steps, values, strict=True))
            draw_line(axes[0], thin(points), color=colour, label=f"layer group {number}")
    lines = (("learning rate", lrs, BLUE), ("momentum", _points(rates, "momentum"), GREEN))
    for panel, (name, points, colour) in zip(axes, lines, strict=True):
        label = "the last, the head" if len(by_group) > 1 and panel is axes[0] else None
        draw_line(panel, thin(points), color=colour, label=label)
        panel.set_ylabel(name)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(by_group) > 1:  # the stem's rate may be a hundredth of the head's; frozen ones have none
        axes[0].set_yscale("log", nonpositive="mask")
    else:
        axes[0].set_ylim(0, 1.1 * max(lr for _, lr in lrs))
    _step_axis(axes, phases)
    return svg(with_legend(figure), "schedule")


def sizes(epochs: list[Row], phases: list[Row]) -> str:
    """Draw image size and batch size of each epoch."""
    if not epochs:
        return ""
    figure, axes = new_figure(2, sharex=True)
    labels = {"image_size": "image size (px)", "batch_size": "batch per process"}
    for panel, (key, label), colour in zip(axes, labels.items(), (PURPLE, VERMILLION), strict=True):
        points = [(row["epoch"] + end, row[key]) for row in epochs for end in (0, 1)]
        draw_line(panel, points, color=colour, linewidth=2.4)
        largest = max(value for _, value in points)
        ticks = [largest]
        for value in sorted({value for _, value in points}, reverse=True):
            if min(value, ticks[-1] - value) > 0.2 * largest:
                ticks.append(value)
        panel.set_ylim(0, 1.15 * largest)
        panel.set_yticks([0, *ticks])
        panel.set_ylabel(label)
    _epoch_axis(axes[1], phases, names=False)
    return svg(figure, "sizes")


def throughput(steps: list[Row], phases: list[Row]) -> str:
    """Draw images per second of each logged step, over all processes."""
    points = _points(steps, "images_per_sec")
    if not points:
        return ""
    figure, (axes,) = new_figure()
    dots = {"marker": "o", "markersize": 2, "linewidth": 1}
    draw_line(axes, thin(points), color=BLUE, **dots)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    _step_axis([axes], phases)
    axes.set(ylabel="images/s in total")
    return svg(figure, "throughput")


def _log_if_spread(axes: Axes, values: list[float]) -> None:
    """Use a log axis where a few large values would flatten all others."""
    if values and min(values) > 0 and max(values) > 30 * median_high(values):
        axes.set_yscale("log")


def _epochs_done(row: Row, phases: list[Row]) -> float | None:
    """Convert a row's step to epochs, with a fraction.

    None for a row of an epoch in which another number of processes counted the steps.
    """
    for phase in reversed(phases):
        if row["step"] >= phase["first_step"]:
            steps = row["step"] - phase["first_step"]
            done: float = phase["first_epoch"] + steps / phase["steps_per_epoch"]
            return done if row["epoch"] <= done <= row["epoch"] + 1 else None
    return None


def _epoch_axis(axes: Axes, phases: list[Row], names: bool = True) -> None:
    axes.set_xlabel("epochs done")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if phases:
        end = phases[-1]["first_epoch"] + phases[-1]["epochs"]
        axes.set_xlim(0, end)
        mark_phases(axes, phases, [p["first_epoch"] for p in phases], end, names)


def _step_axis(panels: list[Axes], phases: list[Row]) -> None:
    """Label the shared axis of steps below the last panel, and mark the phases in all of them."""
    axis = panels[-1].xaxis
    axis.set_label_text("step")
    axis.set_major_locator(MaxNLocator(integer=True))
    axis.set_major_formatter(FuncFormatter(thousands))
    if phases:
        last = phases[-1]
        end = last["first_step"] + last["epochs"] * last["steps_per_epoch"]
        panels[-1].set_xlim(0, end)
        for panel in panels:
            starts = [phase["first_step"] for phase in phases]
            mark_phases(panel, phases, starts, end, names=panel is panels[0])


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


def epoch_seconds(epochs: list[Row]) -> str:
    """Draw the seconds of each epoch: computing, waiting for data, and evaluation."""
    if not epochs:
        return ""
    figure, (axes,) = new_figure()
    before: Row = {"train_seconds": 0.0, "eval_seconds": 0.0, "data_wait_seconds": 0.0}
    spent = []
    for row in epochs:
        train, evaluation, wait = (row[key] - before[key] for key in before)
        spent.append((max(0.0, train - wait), wait, max(0.0, evaluation)))
        before = {key: row[key] for key in before}
    numbers = [row["epoch"] + 1 for row in epochs]
    bottom = [0.0] * len(epochs)
    parts = {"compute": "computing", "data_wait": "waiting for data", "evaluation": "evaluation"}
    for (key, name), values in zip(parts.items(), zip(*spent, strict=True), strict=True):
        axes.bar(numbers, values, 0.8, bottom, label=name, color=TIME_COLOURS[key])
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(numbers) <= 4:
        axes.set_xticks(numbers)
    axes.set(xlabel="epoch", ylabel="seconds", xlim=(0.4, max(numbers[-1], 4) + 0.6))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    axes.grid(visible=False, axis="x")
    return svg(with_legend(figure), "epoch_seconds")


def time_split(seconds: Row) -> str:
    """Draw the wall time as one bar; label parts above 10 % with share and, if it fits, name."""
    parts = {key: float(value) for key, value in seconds.items() if value and value > 0}
    total = sum(parts.values())
    if not total:
        return ""
    figure, (axes,) = new_figure(size=(WIDTH, 0.8))
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
            look: Row = {"ha": "center", "va": "center", "color": ink, "fontsize": SMALL}
            axes.text(left + share / 2, 0, "\n".join(lines), parse_math=False, **look)
        left += share
    axes.set(xlim=(0, 100), ylim=(-0.4, 0.4))
    axes.set_axis_off()
    return svg(figure, "time_split")
