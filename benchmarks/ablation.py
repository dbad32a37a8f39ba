"""What each part of a recipe gives: trained whole, and with one part switched off at a time.

    python -m benchmarks.ablation --data CIFAR10 --runs 3

Every run is a `python -m fastimagenet.train` of its own, in OUTPUT/PART-seedS. The same command
goes on where it was stopped, and repeats no run that is finished.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastimagenet.assemble import with_copies

from benchmarks.ablation_results import FULL, read_ablation, table
from benchmarks.superconvergence import describe
from benchmarks.trainings import Training, check_folder, train_all
from fastimagenet import cli
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Recipe
from pipelines.backends import BACKENDS
from pipelines.cli import Parser, at_least, make_parser, output_folder
from pipelines.errors import UserError
from pipelines.files import write_object, write_text

PEER_LR_PER_IMAGE = 11.5 / (1024 * (1 + 1 / 0.15))
PEER_DECAY_PER_IMAGE = 0.0153 / (1024 * (1 + 1 / 0.15))
"""Of airbench94, which trains the same network by SGD: LR, and LR times weight decay."""


def without_muon(recipe: Recipe) -> list[str]:
    """SGD at the rates that airbench94 has for it."""
    lr = PEER_LR_PER_IMAGE * recipe.phases[0].batch_size
    decay = PEER_DECAY_PER_IMAGE / PEER_LR_PER_IMAGE
    return ["optimizer=sgd", f"max_lr={lr:.4g}", f"weight_decay={decay:.4g}"]


def without_growing(recipe: Recipe) -> list[str]:
    """Every phase at the size of the last one."""
    last = recipe.phases[-1].image_size
    sized = (f"phases.{index}.image_size={last}" for index in range(len(recipe.phases)))
    return list(sized)


PARTS: dict[str, Callable[[Recipe], list[str]]] = {
    "whitening": lambda _: ["whitening=false"],
    "dirac_init": lambda _: ["dirac_init=false"],
    "bias_lr_factor": lambda _: ["bias_lr_factor=1"],
    "label_smoothing": lambda _: ["label_smoothing=0"],
    "alternating_flip": lambda _: ["alternating_flip=false"],
    "ema_decay": lambda _: ["ema_decay=0"],
    "optimizer": without_muon,
    "image_size": without_growing,
}
"""Recipe field -> the settings that switch it off. TTA is in every row, on and off."""


def parser() -> Parser:
    """All flags of the command."""
    result = make_parser(
        "benchmarks.ablation",
        "Train a recipe whole and with one of its parts switched off at a time, and compare.",
        "python -m benchmarks.ablation --data CIFAR10 --runs 3 --only whitening optimizer",
    )
    add = result.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="image folder")
    add("--recipe", default="cifar10-speed", metavar="NAME", help="default cifar10-speed")
    parts = ", ".join(PARTS)
    add("--only", nargs="+", choices=list(PARTS), metavar="FIELD", help=f"some of {parts}")
    add("--runs", type=at_least(1), default=3, metavar="N", help="seeds of each; default 3")
    add("--seed", type=at_least(0), default=0, metavar="S", help="the first seed; default 0")
    folder = Path("runs/ablation")
    add("--output", type=output_folder, default=folder, metavar="DIR", help=f"default {folder}")
    add("--epochs", type=int, metavar="E", help="a rehearsal: stretch the recipe to E epochs")
    help_text = "a rehearsal: change a recipe field in all runs; repeatable"
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help=help_text)
    add("--backend", choices=BACKENDS, default="memory", help="as of train; default memory")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="as of train")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    data = describe(args.data)
    trainings = make_trainings(args, data.train_images)
    for training in trainings:
        check_folder(training, os.path.abspath(args.data))
    status = train_all(trainings)
    if any(training.finished and training.run == FULL for training in trainings):
        command = shlex.join(["python", "-m", "benchmarks.ablation", *argv])
        result = read_ablation(trainings, data, command)
        write_object(args.output / "ablation.json", result)
        write_text(args.output / "table.md", table(result))
        print(f"\n{table(result)}\ntable and JSON: {args.output}", flush=True)
    else:
        print("\nno run of the whole recipe is finished: no table yet")
    return status


def make_trainings(args: argparse.Namespace, num_train: int) -> list[Training]:
    """The recipe and each part that it has, switched off; seed by seed, so that what disturbs the
    machine disturbs all alike. Raises UserError for a part that the recipe does not have."""
    whole = recipe_toml.with_settings(named_recipe(args.recipe), args.set)
    variants: dict[str, list[str]] = {FULL: []}
    for part in args.only or PARTS:
        settings = PARTS[part](whole)
        if has(whole, part):
            variants[part] = settings
        elif args.only:
            raise UserError(f"--only {part}: recipe {args.recipe} does not use it")
    trainings = []
    for seed in range(args.seed, args.seed + args.runs):
        for run, settings in variants.items():
            folder = args.output / f"{run}-seed{seed}"
            changes = [*args.set, *settings]
            recipe = recipe_toml.with_settings(named_recipe(args.recipe), changes)
            recipe = recipe if args.epochs is None else recipe.stretched(args.epochs)
            plan = Plan.of(with_copies(recipe, args.data), 1, num_train)
            flags = ["--data", str(args.data), "--recipe", args.recipe, "--seed", str(seed)]
            flags += ["--output", str(folder), "--resume", "auto", "--nproc-per-node", "1"]
            flags += ["--backend", args.backend, "--device", args.device]
            flags += [word for change in changes for word in ("--set", change)]
            flags += [] if args.epochs is None else ["--epochs", str(args.epochs)]
            trainings.append(Training(run=run, seed=seed, plan=plan, folder=folder, flags=flags))
    return trainings


def has(recipe: Recipe, part: str) -> bool:
    """Whether the recipe uses it, that is, whether there is something to switch off."""
    if part == "image_size":
        return len({phase.image_size for phase in recipe.phases}) > 1
    if part == "optimizer":
        return recipe.optimizer != "sgd"
    return getattr(recipe, part) != getattr(Recipe, part)


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
