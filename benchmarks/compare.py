"""Finished runs side by side: accuracy against updates, and the learning rates that led there.

python -m benchmarks.compare runs/one runs/other
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run_plots import Curve, accuracy_and_lr
from benchmarks.run_table import accuracy_points, lr_points, markdown, schedule_text
from fastimagenet import cli
from fastimagenet.figures import write_files
from fastimagenet.formats import duration, percent
from fastimagenet.run_folder import Run, read_run
from pipelines.errors import UserError

HEADER = ("run", "max_lr", "schedule", "updates", "top-1", "train time")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError naming the folder."""
    parser = cli.make_parser(
        "benchmarks.compare",
        "Print a table of finished runs and draw them into one picture (comparison.svg, .png).",
        "python -m benchmarks.compare runs/one runs/other --output comparison",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's --output folder")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path(), help="default: here")
    args = parser.parse_args(argv)
    runs = {str(folder): read_run(folder) for folder in args.runs}
    for name, run in runs.items():
        if not run.summary:
            raise UserError(f"{name} is not finished: go on with it by train --resume auto")
    print(markdown([HEADER, *(row(name, run) for name, run in runs.items())]))
    curves = [
        Curve(name, name, [accuracy_points(run.epochs)], lr_points(run.steps))
        for name, run in runs.items()
    ]
    for path in write_files(accuracy_and_lr(curves), args.output, "comparison"):
        print(path)
    return 0


def row(name: str, run: Run) -> tuple[str, ...]:
    """The cells of one run."""
    recipe, summary = run.plan["recipe"], run.summary
    return (
        name,
        f"{recipe['max_lr']:g}",
        schedule_text(recipe),
        f"{summary['steps']:,}",
        percent(summary["top1"]),
        duration(summary["train_seconds"]),
    )


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
