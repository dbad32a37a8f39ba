"""The published super-convergence study of CIFAR-10, trained again and set beside its figures.

    python -m benchmarks.superconvergence --data CIFAR10

Every run is a `python -m fastimagenet.train` of its own, in OUTPUT/RUN-seedS. The same command
resumes where it was stopped, and repeats no run that is finished. The status is 1 if a run has
failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.common.matrix import (
    Data,
    Matrix,
    Training,
    Variant,
    add_matrix_flags,
    describe,
    measured,
    set_flags,
    variant,
)
from benchmarks.common.measuring import begin, by_column, command_parser, document, write_result
from benchmarks.common.plots import (
    Curve,
    accuracy_and_lr,
    accuracy_points,
    lr_points,
    schedule_text,
)
from fastimagenet import cli
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import PRECISIONS
from fastimagenet.recipes.superconvergence import COMPARISON, IMAGES_PER_CLASS, RUNS, STUDY
from fastimagenet.report.figures import write_files
from fastimagenet.report.run import Run
from pipelines.datasets.skip_list import skip_line
from pipelines.datasets.split import read_split
from pipelines.files import Row, write_text
from pipelines.formats import NO_BREAK, duration, number, percent

ACCURACY = (
    "plain top-1 of all validation images after the last epoch: mean over n seeds, lowest .. "
    "highest"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="image folder of CIFAR-10")
    help_text = f"some of {', '.join(RUNS)}; default: the {len(STUDY)} of the study"
    runs, study = list(RUNS), list(STUDY)
    add("--only", nargs="+", choices=runs, default=study, metavar="RUN", help=help_text)
    add_matrix_flags(parser, 1, Path("runs/superconvergence"))
    add("--precision", choices=PRECISIONS, help="in place of the recipes', fp32 for the study")
    args, about = begin(parser, argv)
    data = describe(args.data)
    left_out = beyond_the_first(args.data, IMAGES_PER_CLASS)
    found = variants(args, data.train_images, len(left_out))
    matrix = Matrix.of(found, range(args.seed, args.seed + args.runs), args.output, args.data)
    if not COMPARISON.keys().isdisjoint(args.only):
        write_text(skip_list(args), "".join(f"{skip_line(path)}\n" for path in left_out))
    status = matrix.run()
    if matrix.finished:
        told = rehearsal(args, data)
        result = read_results(matrix.finished, data, told, about["command"])
        result |= {"failed": matrix.failed_text}
        write_result(args.output, "superconvergence", result, table(result))
        curves = [curve(run) for run in result["runs"]]
        write_files(accuracy_and_lr(curves), args.output, "superconvergence")
        print(f"\n{table(result)}\ntable and picture: {args.output}", flush=True)
    else:
        print("\nno run is finished: no table yet")
    return status


def beyond_the_first(folder: Path, count: int) -> list[str]:
    """List the training images of each class but its first ones: the comparison leaves them out."""
    split = read_split(folder, "train", check_files=False)
    labels = np.asarray(split.labels)
    starts = np.searchsorted(labels, np.arange(len(split.classes)))
    indices = np.flatnonzero(np.arange(len(split)) - starts[labels] >= count)
    return [split.files[index].path for index in indices.tolist()]


def skip_list(args: argparse.Namespace) -> Path:
    """Return where what the comparison leaves out is written."""
    return Path(args.output) / f"beyond-{IMAGES_PER_CLASS}-per-class.txt"


def rehearsal(args: argparse.Namespace, data: Data) -> str:
    """Tell what the flags and the data change about the published experiment."""
    flags = [] if args.epochs is None else ["--epochs", str(args.epochs)]
    flags += set_flags(args.set)
    if args.precision and any(RUNS[run].precision != args.precision for run in args.only):
        flags += ["--precision", args.precision]
    if args.backend == "synthetic":
        flags += ["--backend", "synthetic"]
    reasons = [shlex.join(flags)] if flags else []
    return ", ".join(reasons if data.is_cifar10 else [*reasons, "not all of CIFAR-10"])


def variants(args: argparse.Namespace, num_train: int, left_out: int) -> list[Variant]:
    """Return the runs that were asked for."""
    found = []
    for run in dict.fromkeys(args.only):
        one = variant(args, run, RUNS[run].name, num_train)
        if args.precision is not None:
            flags = [*one.flags, "--precision", args.precision]
            one = replace(one, recipe=replace(one.recipe, precision=args.precision), flags=flags)
        if run in COMPARISON:
            flags = [*one.flags, "--skip-list", str(skip_list(args))]
            one = replace(one, flags=flags, num_train=num_train - left_out)
        found.append(one)
    return found


def read_results(finished: Sequence[Training], data: Data, rehearsal: str, command: str) -> Row:
    """Return what at least one finished training says: all runs, and on what they were made.

    `rehearsal` tells what makes it another experiment than the published one; "" if nothing does.
    """
    plans = {training.run: training.plan for training in finished}
    return measured([training.summary for training in finished], command) | {
        "data": asdict(data),
        "rehearsal": rehearsal,
        "accuracy": ACCURACY,
        "runs": [
            run_result(run, plan, [seed_result(t) for t in finished if t.run == run], rehearsal)
            for run, plan in plans.items()
        ],
    }


def run_result(run: str, plan: Plan, seeds: list[Row], rehearsal: str) -> Row:
    """Return means over the finished seeds of one run; accuracies as fractions, times in seconds.

    `published` has the study's own values and top1, None for the comparison, which has none;
    `difference_points` is None without them, and for a rehearsal.
    """
    published = STUDY.get(run)
    top1 = [seed["top1"] for seed in seeds]
    mean = fmean(top1)
    return {
        "run": run,
        "recipe": asdict(plan.recipe),
        "iterations": plan.total_steps,
        "published": asdict(published) if published else None,
        "n": len(seeds),
        "seeds": seeds,
        "mean": mean,
        "lowest": min(top1),
        "highest": max(top1),
        "difference_points": 100 * (mean - published.top1) if published and not rehearsal else None,
        "train_seconds": fmean(seed["train_seconds"] for seed in seeds),
        "images_per_sec": fmean(seed["images_per_sec"] for seed in seeds),
    }


def seed_result(training: Training) -> Row:
    """Return what one finished training gave. `top1`, after the last epoch, is what counts."""
    names = ("started", "top1", "train_seconds", "wall_seconds", "images_per_sec")
    best = max(row["top1"] for row in training.epochs if row["top1"] is not None)
    about = {"seed": training.seed, "folder": str(training.folder), "best_top1": best}
    return about | {name: training.summary[name] for name in names}


def table(result: Row) -> str:
    """Format the result as Markdown, with what it was measured on and what counts."""
    data, versions, runs = Data(**result["data"]), result["versions"], result["runs"]
    rehearsal = ""
    if result["rehearsal"]:
        rehearsal = f"Rehearsal ({result['rehearsal']}): not what the recipes say, "
        rehearsal += "so without differences to published figures."
    notes = [f"Ours: {result['accuracy']}. Train time and images/s are means over the seeds."]
    if names := ", ".join(run["run"] for run in runs if run["run"] in COMPARISON):
        notes += [f"{names}: the first {IMAGES_PER_CLASS:,} training images of each class."]
    if any(run["published"] for run in runs):
        notes += ["Published: one training each, on CIFAR-10's original pixels." + pixels(data)]
    return document(
        f"# Super-convergence on {'CIFAR-10' if data.dataset == 'CIFAR10' else data.name}",
        f"{result['hardware']}; {result['precision']}; torch {versions['torch']}, "
        f"Python {versions['python']}; {result['date']}; {data.counts}.",
        rehearsal,
        by_column([cells(run) for run in runs]),
        "\n".join(notes),
        result["failed"],
    )


def pixels(data: Data) -> str:
    """Tell what the names of the files say about the pixels."""
    if data.is_jpeg:
        return " The data here are JPEGs, which only come near them: not quite the same task."
    return f" The data here are {', '.join(data.suffixes)} files."


def cells(run: Row) -> dict[str, str]:
    """Format the cells of one run, by column."""
    recipe, points = run["recipe"], run["difference_points"]
    ours = percent(run["mean"])
    if run["n"] > 1:
        ours += f", {100 * run['lowest']:.2f} .. {100 * run['highest']:.2f}"
    return {
        "run": run["run"],
        "peak LR": f"{recipe['max_lr']:g}",
        "epochs": str(sum(phase["epochs"] for phase in recipe["phases"])),
        "schedule": schedule_text(recipe),
        "iterations": f"{run['iterations']:,}",
        "published": percent(run["published"]["top1"]) if run["published"] else "-",
        "ours (n)": f"{ours} ({run['n']})",
        "difference": "-" if points is None else f"{points:+.2f} points",
        "train time": duration(run["train_seconds"]),
        "images/s": number(run["images_per_sec"], ",.0f"),
    }


def curve(run: Row) -> Curve:
    """Return what the rows of the run's folders hold."""
    runs = [Run.open(seed["folder"]) for seed in run["seeds"]]
    legend = run["run"]
    if run["difference_points"] is not None:
        legend += f": published {percent(run['published']['top1'])}"
    return Curve(
        name=run["run"],
        legend=legend.replace(NO_BREAK, " "),
        accuracy=[accuracy_points(each.epochs) for each in runs],
        lr=lr_points(runs[0].rates),
    )


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
