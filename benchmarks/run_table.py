"""What finished runs say, for people: the table as Markdown, and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.run_plots import Curve, accuracy_and_lr
from benchmarks.run_results import Data, Result, RunResult
from fastimagenet.recipes.superconvergence import COMPARISON, IMAGES_PER_CLASS
from fastimagenet.report.figures import Points, write_files
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from pipelines.files import Row, write_object, write_text
from pipelines.formats import NO_BREAK, duration, number, percent

HEADER = (
    *("run", "peak LR", "epochs", "schedule", "iterations", "published", "ours (n)"),
    *("difference", "train time", "images/s"),
)


def write_results(result: Result, folder: Path) -> None:
    """table.md, superconvergence.json and the picture as .svg and .png."""
    write_text(folder / "table.md", table(result))
    write_object(folder / "superconvergence.json", asdict(result))
    write_files(accuracy_and_lr([curve(run) for run in result.runs]), folder, "superconvergence")


def table(result: Result) -> str:
    """The table as Markdown, with what it was measured on and what counts."""
    data, versions = result.data, result.versions
    counts = f"{data.train_images:,} training and {data.val_images:,} validation images"
    lines = [
        f"# Super-convergence on {'CIFAR-10' if data.dataset == 'CIFAR10' else data.name}",
        "",
        f"{result.hardware}; {result.precision}; torch {versions['torch']}, "
        f"Python {versions['python']}; {result.date}; {counts} ({', '.join(data.suffixes)}).",
        "",
    ]
    if result.rehearsal:
        changes = f"Rehearsal ({result.rehearsal}): not what the recipes say, "
        lines += [changes + "so without differences to published figures.", ""]
    lines += [markdown([HEADER, *map(table_row, result.runs)]), ""]
    lines += [f"Ours: {result.accuracy}. Train time and images/s are means over the seeds."]
    if not COMPARISON.keys().isdisjoint(run.run for run in result.runs):
        names = ", ".join(run.run for run in result.runs if run.run in COMPARISON)
        lines += [f"{names}: the first {IMAGES_PER_CLASS:,} training images of each class."]
    if any(run.published for run in result.runs):
        lines += ["Published: one training each, on CIFAR-10's original pixels." + pixels(data)]
    return "\n".join(lines).replace(NO_BREAK, " ") + "\n"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header, aligned for the terminal, too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded).replace(NO_BREAK, " ")


def pixels(data: Data) -> str:
    """What the names of the files say about it."""
    if data.is_jpeg:
        return " The data here are JPEGs, which only come near them: not quite the same task."
    return f" The data here are {', '.join(data.suffixes)} files."


def table_row(run: RunResult) -> list[str]:
    """The cells of one run."""
    recipe = run.recipe
    ours = percent(run.mean)
    if run.n > 1:
        ours += f", {100 * run.lowest:.2f} .. {100 * run.highest:.2f}"
    points = run.difference_points
    return [
        run.run,
        f"{recipe['max_lr']:g}",
        str(sum(phase["epochs"] for phase in recipe["phases"])),
        schedule_text(recipe),
        f"{run.iterations:,}",
        percent(run.published["top1"]) if run.published else "-",
        f"{ours} ({run.n})",
        "-" if points is None else f"{points:+.2f} points",
        duration(run.train_seconds),
        number(run.images_per_sec, ",.0f"),
    ]


def schedule_text(recipe: Row) -> str:
    """use_clr_beta, or what there is in its place."""
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


def curve(run: RunResult) -> Curve:
    """What the rows of the run's folders hold."""
    rows = [read_rows(Path(seed.folder)) for seed in run.seeds]
    legend = run.run
    if run.difference_points is not None and run.published:
        legend += f": published {percent(run.published['top1'])}"
    return Curve(
        name=run.run,
        legend=legend.replace(NO_BREAK, " "),
        accuracy=[accuracy_points(rows_of("epoch", seed)) for seed in rows],
        lr=lr_points(rows_of("step", rows[0])),
    )


def accuracy_points(epochs: list[Row]) -> Points:
    """(updates done, plain top-1 in per cent) of every evaluation."""
    return [(row["step"], 100 * row["top1"]) for row in epochs if row["top1"] is not None]


def lr_points(steps: list[Row]) -> Points:
    """(updates done, learning rate) of every logged step."""
    return [(row["step"], row["lr"]) for row in steps]
