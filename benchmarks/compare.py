"""Finished runs side by side, with published entries for the same data: one page, one picture.

python -m benchmarks.compare runs/one runs/other
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from benchmarks import comparison_plots
from benchmarks.comparison_plots import METRICS, Comparison, short_names
from benchmarks.published import published
from benchmarks.run_plots import Curve, accuracy_and_lr
from benchmarks.run_table import accuracy_points, lr_points, markdown, schedule_text
from fastimagenet import cli
from fastimagenet.report.dawnbench import TRAIN_CLOCK
from fastimagenet.report.figures import svg, write_files
from fastimagenet.report.run import Run
from pipelines import pages
from pipelines.cli import make_parser, output_folder
from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.formats import duration, percent

HEADER = (
    *("run", "hardware", "top-1", "top-5", "train time", "time to target", "wall time"),
    *("epochs", "updates", "max_lr", "schedule", "data"),
)
TERMINAL = ("run", "max_lr", "schedule", "updates", "top-1", "train time", "time to target")
"""The columns that the terminal gets."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError naming the folder."""
    parser = make_parser(
        "benchmarks.compare",
        "Set finished runs beside each other and beside published figures: a table, a page\n"
        "(compare.html) and a picture (comparison.svg, .png).",
        "python -m benchmarks.compare runs/one runs/other --output comparison",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="a run's --output folder")
    add("--output", metavar="DIR", type=output_folder, default=Path(), help="default: here")
    args = parser.parse_args(argv)
    runs = {str(folder): Run.open(folder) for folder in args.runs}
    for name, run in runs.items():
        if not run.summary:
            raise UserError(f"{name} is not finished: go on with it by train --resume auto")
    rows = [row(name, run) for name, run in runs.items()]
    shown = [HEADER.index(name) for name in TERMINAL]
    print(markdown([[cells[index] for index in shown] for cells in (HEADER, *rows)]))
    what = comparison(runs)
    page = args.output / "compare.html"
    write_text(page, render(what, rows))
    for path in (page, *write_files(comparison_plots.picture(what), args.output, "comparison")):
        print(path)
    return 0


def comparison(runs: dict[str, Run]) -> Comparison:
    """By top-5 where that is the target of every run, else by top-1."""
    targets = {run.target[0] if run.target else "top1" for run in runs.values()}
    metric = "top5" if targets == {"top5"} else "top1"
    return Comparison(
        runs=dict(zip(short_names(list(runs)), runs.values(), strict=True)),
        metric=metric,
        entries=published({run.summary["dataset"] for run in runs.values()}, metric),
    )


def render(what: Comparison, rows: list[tuple[str, ...]]) -> str:
    """The page."""
    curves = [
        Curve(name, name, [accuracy_points(run.epochs)], lr_points(run.steps))
        for name, run in what.runs.items()
    ]
    metric = METRICS[what.metric]
    figures = {
        f"{metric} against training time": comparison_plots.against_time(what),
        f"{metric} against epochs": comparison_plots.against_epochs(what),
        "Where the wall time went": comparison_plots.time_split(what),
        "top-1 and learning rate against updates": accuracy_and_lr(curves),
    }
    beside = (
        f"beside {len(what.entries)} published entries"
        if what.entries
        else ("there is no published entry for these data")
    )
    return pages.render(
        Path(__file__).with_name("compare.html.jinja"),
        lead=f"Plain validation {metric}, one view of every image; {beside}.",
        header=HEADER,
        rows=[(name, *cells[1:]) for name, cells in zip(what.runs, rows, strict=True)],
        figures=[
            (heading, Markup(svg(figure, f"plot{index}")))
            for index, (heading, figure) in enumerate(figures.items())
        ],
        entries=what.entries,
        clock=TRAIN_CLOCK,
    )


def row(name: str, run: Run) -> tuple[str, ...]:
    """The cells of one run."""
    recipe, summary = run.plan["recipe"], run.summary
    reached = run.seconds_to_target
    return (
        name,
        summary["hardware"],
        percent(summary["top1"]),
        percent(summary["top5"]),
        duration(summary["train_seconds"]),
        ("not reached" if reached is None else duration(reached)) if run.target else "no target",
        duration(summary["wall_seconds"]),
        str(summary["epochs"]),
        f"{summary['steps']:,}",
        f"{recipe['max_lr']:g}",
        schedule_text(recipe),
        summary["dataset"],
    )


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
