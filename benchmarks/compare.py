"""Finished runs side by side, with published entries for the same data: one page, one picture.

python -m benchmarks.compare runs/one runs/other
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmarks.common.measuring import by_column, command_parser
from benchmarks.common.plots import (
    Curve,
    accuracy_and_lr,
    accuracy_points,
    look,
    lr_points,
    schedule_text,
    set_heights,
    svgs,
    time_bars,
)
from benchmarks.common.published import Published, published
from fastimagenet import cli
from fastimagenet.report.dawnbench import TRAIN_CLOCK
from fastimagenet.report.figures import LEGEND, SMALL, draw_line, new_figure, thousands, write_files
from fastimagenet.report.run import Run
from pipelines import pages
from pipelines.cli import output_folder
from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.formats import NO_BREAK, duration, percent, time_unit

TERMINAL = ("run", "data", "peak LR", "schedule", "steps", "top-1", "train time", "time to target")
"""The columns that the terminal gets."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError naming the folder."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="a run's --output folder")
    add("--output", metavar="DIR", type=output_folder, default=Path(), help="default: here")
    args = parser.parse_args(argv)
    runs = {str(folder): Run.open(folder) for folder in args.runs}
    for name, run in runs.items():
        if not run.summary:
            raise UserError(f"{name} is not finished: resume it by train --resume auto")
    rows = [row(name, run) for name, run in runs.items()]
    print(by_column([{column: cells[column] for column in TERMINAL} for cells in rows]))
    for difference in differences(rows):
        print(f"note: {difference}")
    what = comparison(runs)
    page = args.output / "compare.html"
    write_text(page, render(what, rows))
    for path in (page, *write_files(picture(what), args.output, "comparison")):
        print(path)
    return 0


def differences(rows: list[dict[str, str]]) -> list[str]:
    """Say where runs differ so that their figures say nothing of one another."""
    found = []
    for column, what in (
        ("data", "accuracies"),
        ("starts from", "trainings"),
        ("target", "times to target"),
    ):
        values = list(dict.fromkeys(cells[column] for cells in rows))
        if len(values) > 1:
            found.append(f"their {what} do not compare, of {'; '.join(values)}")
    return found


def comparison(runs: dict[str, Run]) -> Comparison:
    """Compare by top-5 where that is the target of every run, else by top-1."""
    targets = {run.target[0] if run.target else "top1" for run in runs.values()}
    metric = "top5" if targets == {"top5"} else "top1"
    return Comparison(
        runs=dict(zip(short_names(list(runs)), runs.values(), strict=True)),
        metric=metric,
        entries=published({run.summary["dataset"] for run in runs.values()}, metric),
    )


def render(what: Comparison, rows: list[dict[str, str]]) -> str:
    """Render the page."""
    curves = [
        Curve(name, name, [accuracy_points(run.epochs)], lr_points(run.rates))
        for name, run in what.runs.items()
    ]
    metric = METRICS[what.metric]
    figures = {
        f"{metric} against training time": alone(draw_against_time, what, 4.6),
        f"{metric} against epochs": alone(draw_against_epochs, what, 3.4),
        "Where the wall time went": alone(draw_time_split, what, 1.3 + 0.4 * len(curves)),
        "top-1 and learning rate against steps": accuracy_and_lr(curves),
    }
    beside = "there is no published entry for these data"
    if what.entries:
        beside = f"beside {len(what.entries)} published entries"
    short = zip(what.runs, rows, strict=True)
    return pages.render(
        Path(__file__).with_name("compare.html.jinja"),
        sentences=[
            f"Plain validation {metric}, one view of every image; {beside}.",
            *(f"{text[0].upper()}{text[1:]}." for text in differences(rows)),
        ],
        header=list(rows[0]),
        left=[list(rows[0]).index(name) for name in ("hardware", "schedule", "data")],
        rows=[(name, *list(cells.values())[1:]) for name, cells in short],
        figures=svgs(figures),
        entries=[entry_cells(*pair) for pair in enumerate(what.entries, start=1)],
        clock=TRAIN_CLOCK,
    )


def entry_cells(place: int, entry: Published) -> list[str]:
    """Format the row of a published entry, under the number that the plots give it."""
    least = "at least " if entry.at_least else ""
    accuracies = (
        "-" if value is None else least + percent(value, 1) for value in (entry.top1, entry.top5)
    )
    cost = "-" if entry.usd is None else f"${entry.usd:.4g}"
    return [
        *(str(place), entry.name, entry.hardware, *accuracies, duration(entry.seconds)),
        *(cost, str(entry.epochs or "-"), entry.source),
    ]


def row(name: str, run: Run) -> dict[str, str]:
    """Format the cells of one run, by column."""
    recipe, summary = run.plan["recipe"], run.summary
    time = "no target"
    if run.target:
        reached = run.seconds_to_target
        time = "not reached" if reached is None else duration(reached)
    return {
        "run": name,
        "hardware": summary["hardware"],
        "top-1": percent(summary["top1"]),
        "top-5": percent(summary["top5"]),
        "train time": duration(summary["train_seconds"]),
        "target": target_text(run),
        "time to target": time,
        "wall time": duration(summary["wall_seconds"]),
        "epochs": str(summary["epochs"]),
        "steps": f"{summary['steps']:,}",
        "peak LR": "-" if not run.rates else f"{max(rate['lr'] for rate in run.rates):.4g}",
        "schedule": schedule_text(recipe),
        "data": data_text(run),
        "starts from": run.pretrained or "scratch",
    }


def target_text(run: Run) -> str:
    """Format the target, such as "94 % top-1"."""
    if run.target is None:
        return "none"
    metric, value = run.target
    return f"{100 * value:g} % {METRICS[metric]}"


def data_text(run: Run) -> str:
    """Name the data and count the training images, which tells folders of one name apart."""
    count = run.plan.get("num_train")
    return run.summary["dataset"] + (f", {count:,} images" if count else "")


METRICS = {"top1": "top-1", "top5": "top-5"}
NEAR = 0.06
"""Of the width of the time axis: numbers of entries that are nearer stand above each other."""
WIDE = 6.6
"""Inches."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is drawn."""

    runs: dict[str, Run]
    """By the name in the legend."""
    metric: str
    """"top1" or "top5"."""
    entries: list[Published]

    def points(self, run: Run, against: str) -> list[tuple[float, float]]:
        """Return (`against`: "train_seconds", "step" or "epoch"; per cent) of every evaluation."""
        return [
            (row[against] + (against == "epoch"), 100 * row[self.metric])
            for row in run.epochs
            if row.get(self.metric) is not None
        ]


def picture(what: Comparison) -> Figure:
    """Plot accuracy against time and against epochs, and where the time went."""
    figure, axes = new_figure(3, size=(WIDE, 9.2 + 0.25 * len(what.runs)))
    set_heights(axes[0], (5, 4, 0.8 + 0.5 * len(what.runs)))
    draw_against_time(axes[0], what)
    draw_against_epochs(axes[1], what)
    draw_time_split(axes[2], what)
    add_legends(figure, axes[0], what)
    return figure


def alone(draw: Callable[[Axes, Comparison], None], what: Comparison, height: float) -> Figure:
    """Plot one part, in so many inches."""
    figure, (axes,) = new_figure(size=(WIDE, height))
    draw(axes, what)
    if draw is not draw_time_split:
        add_legends(figure, axes, what, published=draw is draw_against_time)
    return figure


def draw_against_time(axes: Axes, what: Comparison) -> None:
    """Draw our lines and the numbered entries; with entries the time axis is logarithmic."""
    seconds = [run.epochs[-1]["train_seconds"] for run in what.runs.values()]
    # A log axis takes the unit of its shortest time, so that few ticks are below 1.
    shortest = min((entry.seconds for entry in what.entries), default=max(seconds))
    unit, length = time_unit(shortest)
    draw_runs(axes, what, "train_seconds", length)
    if what.entries:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.set(xlabel=f"training time ({unit})", ylabel=f"validation {METRICS[what.metric]} (%)")
    draw_entries(axes, what, length)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.06 * (high - low) * bool(what.entries))


def draw_entries(axes: Axes, what: Comparison, length: float) -> None:
    """Draw a point for each entry; numbers that are near each other stand above one another."""
    low, high = axes.get_xlim()
    placed: list[tuple[float, float, int]] = []
    for number, entry in enumerate(what.entries, start=1):
        x, y = entry.seconds / length, 100 * getattr(entry, what.metric)
        width = log(max(high, x) / min(low, x))
        near = [tier for at, level, tier in placed
                if abs(log(x / at)) < NEAR * width and abs(level - y) < 4]  # fmt: skip
        placed.append((x, y, max(near, default=-1) + 1))
        draw_entry(axes, number, entry, *placed[-1])


def draw_entry(axes: Axes, number: int, entry: Published, x: float, y: float, tier: int) -> None:
    """Draw a grey point with its number above, `tier` numbers higher than usual."""
    marker = "^" if entry.at_least else "o"
    axes.plot([x], [y], color="#555555", marker=marker, markersize=4.5)
    axes.annotate(
        str(number), (x, y), xytext=(0, 5 + 10 * tier), textcoords="offset points",
        ha="center", va="bottom", fontsize=SMALL, color="#333333",
    )  # fmt: skip


def draw_runs(axes: Axes, what: Comparison, against: str, length: float = 1.0) -> None:
    """Draw the line of every run, in units of `length`, with a point at its end."""
    for index, run in enumerate(what.runs.values()):
        points = [(x / length, y) for x, y in what.points(run, against)]
        draw_line(axes, points, **look(index))
        draw_line(axes, points[-1:], color=look(index)["color"], marker="o", markersize=4)


def draw_against_epochs(axes: Axes, what: Comparison) -> None:
    """Draw our lines, and the entries that tell their epochs."""
    draw_runs(axes, what, "epoch")
    for number, entry in enumerate(what.entries, start=1):
        if entry.epochs is not None:
            draw_entry(axes, number, entry, entry.epochs, 100 * getattr(entry, what.metric), 0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epochs done", ylabel=f"validation {METRICS[what.metric]} (%)")


def draw_time_split(axes: Axes, what: Comparison) -> None:
    """Draw one bar of the wall time for each run."""
    splits = {name: run.summary["time_split_seconds"] for name, run in what.runs.items()}
    unit, length = time_unit(max(sum(split.values()) for split in splits.values()))
    time_bars(axes, splits, length)
    axes.set(xlabel=f"wall time ({unit})")
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), **(LEGEND | {"ncols": 4}))


def add_legends(figure: Figure, axes: Axes, what: Comparison, published: bool = True) -> None:
    """List the runs above the axes, and the entries by their numbers below the figure."""
    lines = [
        Line2D([], [], label=f"{name}, {run.summary['hardware']}", **look(index))
        for index, (name, run) in enumerate(what.runs.items())
    ]
    axes.legend(handles=lines, loc="lower left", bbox_to_anchor=(0, 1.0), **(LEGEND | {"ncols": 2}))
    if published and what.entries:
        numbers = [
            Line2D([], [], linestyle="", marker=f"${number}$", color="#333333", label=told(entry))
            for number, entry in enumerate(what.entries, start=1)
        ]
        title = "published (triangles: at least this accuracy)"
        style = LEGEND | {"ncols": 2, "title": title, "handlelength": 1.6}
        figure.legend(handles=numbers, loc="outside lower left", **style)


def told(entry: Published) -> str:
    """Format name, hardware and time of an entry."""
    return f"{entry.name}, {entry.hardware}: {duration(entry.seconds)}".replace(NO_BREAK, " ")


def short_names(names: Sequence[str]) -> list[str]:
    """Shorten paths to their last parts, as many as tell them apart."""
    parts = [name.rstrip("/").split("/") for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
