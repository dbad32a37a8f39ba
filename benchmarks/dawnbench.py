"""Seeded runs of a recipe to a target accuracy: how long, how sure, at what cost.

    python -m benchmarks.dawnbench --recipe cifar10 --data CIFAR10 --runs 5 --stop-at-target

Every run is a `python -m fastimagenet.train` of its own, in OUTPUT/seedS. The same command goes on
where it was stopped, and repeats no run that is finished. The status is 1 if a run has missed the
target, or failed, as one does whose loss is not finite any more.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fastimagenet.assemble import chosen_recipe, with_copies

from benchmarks.dawnbench_results import ENERGY, read_results, write_results
from benchmarks.energy import JOULES_PER_KWH, gpu_joules
from benchmarks.trainings import Training, check_folder, train_all
from fastimagenet import cli
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.train import check_entry_flags
from pipelines.cli import Parser, at_least, make_parser, output_folder
from pipelines.datasets.known import dataset_name
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.files import write_object

PASSED_ON = (
    *("data", "recipe", "skip_list", "on_bad_image", "backend", "device", "precision"),
    *("nproc_per_node", "timeout", "global_batch", "epochs"),
    *("author", "author_email", "hardware", "cost_per_hour"),
)
"""Flags that train has, too."""


def parser() -> Parser:
    """All flags of the command."""
    result = make_parser(
        "benchmarks.dawnbench",
        "Train a recipe with several seeds and report the time to its target accuracy.",
        "python -m benchmarks.dawnbench --recipe cifar10 --data CIFAR10 --runs 5 --stop-at-target",
    )
    cli.add_machine_flags(result)
    cli.add_run_flags(result, "runs/dawnbench-RECIPE", output_folder)
    add = result.add_argument
    add("--runs", type=at_least(1), default=1, metavar="N", help="seeds, from --seed on; default 1")
    add("--target", metavar="METRIC=VALUE", help="top5=0.93, top1=0.94; default: the recipe's")
    add("--stop-at-target", action="store_true", help="end each run when it has reached the target")
    add("--epochs", type=int, metavar="E", help="stretch the recipe, LR and phases, to E epochs")
    add("--author", default="anonymous", help="for the DAWNBench entry, as are the next three")
    add("--author-email", default="unknown", metavar="ADDRESS")
    add("--hardware", help="default: what is found, such as 1 x NVIDIA H200")
    add("--cost-per-hour", type=float, metavar="USD", help="on-demand price of all machines")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    check_entry_flags(args)
    if args.nodes != (0, 1):
        raise UserError("--nodes: the runs are started on this machine alone, as --nodes 1")
    recipe = target_recipe(args)
    if args.output is None:
        args.output = Path("runs") / f"dawnbench-{recipe.name}"
    trainings = make_trainings(args, recipe)
    for training in trainings:
        check_folder(training, os.path.abspath(cli.data_folder(args)))
    failed: list[Training] = []
    status = train_all(trainings, around=measured_energy, failed=failed)
    finished = [training for training in trainings if training.finished]
    if not finished:
        print("\nno run is finished: nothing to report yet")
        return status or 1
    command = shlex.join(["python", "-m", "benchmarks.dawnbench", *argv])
    result = read_results(
        finished, [run.seed for run in failed], args.runs, args.cost_per_hour, command, args.output
    )
    print(f"\n{write_results(result, args.output)}\nall of it: {args.output}", flush=True)
    return status or int(result.success_rate < 1)


def target_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of all runs. Raises UserError without a target."""
    recipe = chosen_recipe(args)
    if args.target is not None:
        recipe = replace(recipe, target=args.target)
    if args.epochs is not None:
        recipe = recipe.stretched(args.epochs)
    if not recipe.target:
        raise UserError(f"--target: recipe {recipe.name} has none; name one, such as top1=0.94")
    return with_copies(recipe, cli.data_folder(args))


def make_trainings(args: argparse.Namespace, recipe: Recipe) -> list[Training]:
    """One for each seed. Raises UserError where the data or the target cannot be taken."""
    skips = args.on_bad_image == "skip"
    split = read_split(
        cli.data_folder(args), "train", args.skip_list, skips, on_bad_image=args.on_bad_image
    )
    if dataset_name(split.classes) == "CIFAR10" and recipe.target.startswith("top5"):
        raise UserError("--target: the entries of CIFAR-10 hold top-1 only; name top1=VALUE")
    plan = Plan.of(recipe, cli.launch_of(args).world_size, len(split), args.global_batch)
    flags = ["--stop-at-target"] if args.stop_at_target else []
    for name in PASSED_ON:
        value = getattr(args, name)
        flags += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    settings = [*args.set, *([f"target={args.target}"] if args.target is not None else [])]
    flags += [word for setting in settings for word in ("--set", setting)]
    trainings = []
    for seed in range(args.seed, args.seed + args.runs):
        folder = args.output / f"seed{seed}"
        own = ["--seed", str(seed), "--output", str(folder), "--resume", "auto"]
        trainings.append(
            Training(run=recipe.name, seed=seed, plan=plan, folder=folder, flags=[*flags, *own])
        )
    return trainings


@contextmanager
def measured_energy(training: Training) -> Iterator[None]:
    """Leave the kWh of a training beside it; nothing if it was begun before, or NVML is mute."""
    whole = not (training.folder / "plan.json").exists()
    before = gpu_joules()
    yield
    after = gpu_joules()
    if whole and training.finished and before is not None and after is not None:
        write_object(training.folder / ENERGY, {"gpu_kwh": (after - before) / JOULES_PER_KWH})


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
