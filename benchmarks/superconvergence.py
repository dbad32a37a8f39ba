"""The published super-convergence study of CIFAR-10, trained again and set beside its figures.

    python -m benchmarks.superconvergence --data CIFAR10

Every run is a `python -m fastimagenet.train` of its own, in OUTPUT/RUN-seedS. The same command
goes on where it was stopped, and repeats no run that is finished.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from fastimagenet.assemble import with_copies

from benchmarks.run_results import Data, read_results
from benchmarks.run_table import table, write_results
from benchmarks.trainings import Training, check_folder, train_all
from fastimagenet import cli
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import PRECISIONS
from fastimagenet.recipes.superconvergence import COMPARISON, IMAGES_PER_CLASS, RUNS, STUDY
from pipelines.backends import BACKENDS
from pipelines.cli import Parser, at_least, make_parser, output_folder
from pipelines.datasets.known import dataset_name
from pipelines.datasets.split import check_classes, read_split, skip_line
from pipelines.files import write_text


def parser() -> Parser:
    """All flags of the command."""
    result = make_parser(
        "benchmarks.superconvergence",
        "Train the published super-convergence study of CIFAR-10 and compare accuracies.",
        "python -m benchmarks.superconvergence --data CIFAR10 --only 3b --runs 3",
    )
    add = result.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="image folder of CIFAR-10")
    add(
        "--only",
        nargs="+",
        choices=list(RUNS),
        default=list(STUDY),
        metavar="RUN",
        help=f"some of {', '.join(RUNS)}; default: the {len(STUDY)} of the study",
    )
    add("--runs", type=at_least(1), default=1, metavar="N", help="seeds of each; default 1")
    add("--seed", type=at_least(0), default=0, metavar="S", help="the first seed; default 0")
    add(
        "--output",
        type=output_folder,
        default=Path("runs/superconvergence"),
        metavar="DIR",
        help="default runs/superconvergence",
    )
    add("--epochs", type=int, metavar="E", help="a rehearsal: stretch the recipes to E epochs")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a rehearsal: change a recipe field, such as model=smallnet; repeatable",
    )
    help_text = "as of train; default memory: decoded once, so that no loader holds a GPU back"
    add("--backend", choices=BACKENDS, default="memory", help=help_text)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="as of train")
    add("--precision", choices=PRECISIONS, help="in place of the recipes', fp32 for the study")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    data = describe(args.data)
    left_out = beyond_the_first(args.data, IMAGES_PER_CLASS)
    trainings = make_trainings(args, data.train_images, len(left_out))
    for training in trainings:
        check_folder(training, os.path.abspath(args.data))
    if not COMPARISON.keys().isdisjoint(args.only):
        write_text(skip_list(args), "".join(f"{skip_line(path)}\n" for path in left_out))
    status = train_all(trainings)
    if any(training.finished for training in trainings):
        command = shlex.join(["python", "-m", "benchmarks.superconvergence", *argv])
        result = read_results(trainings, data, rehearsal(args, data), command)
        write_results(result, args.output)
        print(f"\n{table(result)}\ntable and picture: {args.output}", flush=True)
    else:
        print("\nno run is finished: no table yet")
    return status


def describe(folder: Path) -> Data:
    """Count the images. Raises UserError naming the folder."""
    train, val = (read_split(folder, split, check_files=False) for split in ("train", "val"))
    check_classes(train, val)
    suffixes = Counter(Path(file.path).suffix.lower() for file in (*train.files, *val.files))
    return Data(
        name=folder.resolve().name,
        dataset=dataset_name(train.classes),
        train_images=len(train),
        val_images=len(val),
        suffixes=dict(suffixes),
    )


def beyond_the_first(folder: Path, count: int) -> list[str]:
    """The training images of each class but for its first ones: what the comparison leaves out."""
    split = read_split(folder, "train", check_files=False)
    labels = np.asarray(split.labels)
    starts = np.searchsorted(labels, np.arange(len(split.classes)))
    places = np.flatnonzero(np.arange(len(split)) - starts[labels] >= count)
    return [split.files[place].path for place in places.tolist()]


def skip_list(args: argparse.Namespace) -> Path:
    """Where what the comparison leaves out is written."""
    return Path(args.output) / f"beyond-{IMAGES_PER_CLASS}-per-class.txt"


def rehearsal(args: argparse.Namespace, data: Data) -> str:
    """What the flags and the data change about the published experiment."""
    flags = [] if args.epochs is None else ["--epochs", str(args.epochs)]
    flags += [word for setting in args.set for word in ("--set", setting)]
    if args.precision and any(RUNS[run].precision != args.precision for run in args.only):
        flags += ["--precision", args.precision]
    if args.backend == "synthetic":
        flags += ["--backend", "synthetic"]
    reasons = [shlex.join(flags)] if flags else []
    return ", ".join(reasons if data.is_cifar10 else [*reasons, "not all of CIFAR-10"])


def make_trainings(args: argparse.Namespace, num_train: int, left_out: int) -> list[Training]:
    """All that was asked for, seed by seed, so that a stopped study has something of each run."""
    passed_on = ["--backend", args.backend, "--device", args.device]
    passed_on += [word for setting in args.set for word in ("--set", setting)]
    for flag, value in (("--epochs", args.epochs), ("--precision", args.precision)):
        passed_on += [] if value is None else [flag, str(value)]
    trainings = []
    for seed in range(args.seed, args.seed + args.runs):
        for run in dict.fromkeys(args.only):
            name, folder = RUNS[run].name, args.output / f"{run}-seed{seed}"
            recipe = recipe_toml.with_settings(named_recipe(name), args.set)
            recipe = recipe if args.epochs is None else recipe.stretched(args.epochs)
            recipe = replace(recipe, precision=args.precision or recipe.precision)
            recipe = with_copies(recipe, args.data)
            # One process: the batch of the recipes is that of all.
            command = ["--data", str(args.data), "--recipe", name, "--seed", str(seed)]
            command += ["--output", str(folder), "--resume", "auto", "--nproc-per-node", "1"]
            if run in COMPARISON:
                command += ["--skip-list", str(skip_list(args))]
            plan = Plan.of(recipe, 1, num_train - left_out if run in COMPARISON else num_train)
            trainings.append(
                Training(run=run, seed=seed, plan=plan, folder=folder, flags=[*command, *passed_on])
            )
    return trainings


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
