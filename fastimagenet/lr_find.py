"""`python -m fastimagenet.lr_find`: which learning rate, weight decay and momentum to train with.

Flags -> Recipe -> World -> Trainer, as for train; then sweeps of the learning rate, drawn together.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastimagenet import cli
from fastimagenet.assemble import (
    check_output,
    checks_flags,
    chosen_recipe,
    make_trainer,
    read_data,
    with_copies,
    write_plan,
)
from fastimagenet.distributed.collectives import process_group
from fastimagenet.distributed.launch import run_processes
from fastimagenet.distributed.world import World, launched_world
from fastimagenet.lr_finder.analysis import Sweep
from fastimagenet.lr_finder.finder import check_sweep, check_validation, lr_find2
from fastimagenet.lr_finder.results import NullSweepRecorder, SweepRecorder
from fastimagenet.recipes.plan import Plan
from fastimagenet.training.clock import Stopwatch
from pipelines.cli import Parser, make_parser
from pipelines.datasets.split import Split
from pipelines.errors import UserError

if TYPE_CHECKING:
    from fastimagenet.training.trainer import Trainer

DESCRIPTION = """\
Find the learning rate to train with: a training whose LR rises update by update
until the loss runs away, drawn and judged. Nothing of it is kept but the curve.

The sweep takes image size, batch size and data of the recipe's first phase;
--set changes them (phases.0.batch_size=128). The LR at which the loss falls
fastest is given as the recipe's max_lr. With several values of --wd or
--momentum there is one sweep for each combination; the largest weight decay
that still tolerates a high LR is the best."""


def parser() -> Parser:
    """All flags of the command."""
    result = make_parser(
        "fastimagenet.lr_find",
        DESCRIPTION,
        "python -m fastimagenet.lr_find --data photos --recipe mine.toml --wd 1e-2 1e-3 1e-4",
    )
    cli.add_machine_flags(result)
    cli.add_run_flags(result, "runs/lr_find-RECIPE-TIME")
    add = result.add_argument
    help_text = "LR of the first update, as the optimizer gets it; default 1e-5"
    add("--start-lr", type=float, default=1e-5, metavar="LR", help=help_text)
    help_text = "LR that the sweep rises to; default 10"
    add("--end-lr", type=float, default=10.0, metavar="LR", help=help_text)
    add(
        "--num-it",
        type=int,
        default=100,
        metavar="N",
        help="updates a sweep, over the ends of epochs if need be; default 100",
    )
    add(
        "--wd",
        type=float,
        nargs="+",
        metavar="W",
        help="weight decays to sweep with, in place of the recipe's",
    )
    add(
        "--momentum",
        type=float,
        nargs="+",
        metavar="M",
        help="momenta to sweep with; default: what the recipe has where its LR peaks",
    )
    add("--linear", action="store_true", help="raise the LR linearly, not exponentially")
    add(
        "--no-stop-dv",
        action="store_true",
        help="go on to the last update when the loss is beyond 4 x its best, or not finite",
    )
    add(
        "--recipe-out",
        type=Path,
        metavar="FILE.toml",
        help="write the recipe with the values found to this new file, for train --recipe; an "
        "existing file is refused",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    clock = Stopwatch()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    recipe = chosen_recipe(args)
    for weight_decay, momentum in combinations(args):
        check_sweep(args.start_lr, args.end_lr, args.num_it, weight_decay, momentum)
    if args.output is None:
        args.output = Path("runs") / f"lr_find-{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        argv += ["--output", str(args.output)]
    launch = cli.launch_of(args)
    world = launched_world(launch, args.nproc_per_node)
    if checks_flags(world):
        check_output(args.output)
        check_recipe_out(args.recipe_out)
    train, val = read_data(args, world)
    recipe = with_copies(recipe, cli.data_folder(args))
    world_size = launch.world_size if world is None else world.world_size
    plan = Plan.of(recipe, world_size, len(train), args.global_batch)
    check_validation(plan, len(val))
    val = shuffled(val, args.seed)
    if world is None:
        if launch.world_size > 1:
            return run_processes(launch, "fastimagenet.lr_find", argv)
        world = World(device="cpu" if launch.device == "cpu" else "cuda:0")
    with process_group(world, args.timeout):
        return find(args, plan, world, train, val, clock, argv)


def shuffled(split: Split, seed: int) -> Split:
    """The same images in random order: folders are listed by class, and each iteration is
    validated on one batch, which would show a class or two."""
    return split.take(np.random.default_rng(seed).permutation(len(split)))


def combinations(args: argparse.Namespace) -> list[tuple[float | None, float | None]]:
    """Weight decay and momentum of each sweep; None: what the recipe has."""
    weight_decays = dict.fromkeys(args.wd or [None])
    momenta = dict.fromkeys(args.momentum or [None])
    return list(itertools.product(weight_decays, momenta))


def check_recipe_out(path: Path | None) -> None:
    """Raise UserError if the recipe found could not be written there."""
    if path is None:
        return
    if path.suffix != ".toml":
        raise UserError(f"--recipe-out {path} must end with .toml, as --recipe takes it")
    if path.is_dir():
        raise UserError(f"--recipe-out {path} is a folder: name a file")
    if path.exists():
        raise UserError(f"--recipe-out {path} exists and is left alone: name a new file")
    if not path.parent.is_dir():
        raise UserError(f"--recipe-out {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--recipe-out {path}: the folder {path.parent} cannot be written to")


def find(
    args: argparse.Namespace,
    plan: Plan,
    world: World,
    train: Split,
    val: Split,
    clock: Stopwatch,
    argv: list[str],
) -> int:
    """What one process does: the sweeps, and on rank 0 what the command leaves and says."""
    from fastimagenet.lr_finder.results import write_results

    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    trainer = make_trainer(args, plan, world, train, val, clock)
    stopped_by = cli.stop_on_signals(trainer)
    cli.say(world, describe(args, plan))
    if world.is_main:
        write_plan(args.output, plan, train, val)
    sweeps: list[Sweep] = []
    try:
        run_sweeps(args, trainer, sweeps)
    finally:  # what fails in a later sweep leaves the earlier ones
        if world.is_main and sweeps:
            command = shlex.join(["python", "-m", "fastimagenet.lr_find", *argv])
            cli.say(world, write_results(args, trainer, val, sweeps, started, command))
    return cli.stopped_status(stopped_by) if sweeps[-1].ended == "stopped" else 0


def describe(args: argparse.Namespace, plan: Plan) -> str:
    """What will be swept, for the terminal."""
    first = plan.phases[0]
    return (
        f"sweep: recipe {plan.recipe.name}, {plan.recipe.model}, its first phase: "
        f"{first.image_size} px, batch {first.batch_size}, global batch "
        f"{first.global_batch}, {plan.num_train:,} training images, world size {plan.world_size}\n"
        f"  lr {args.start_lr:g} -> {args.end_lr:g} in {args.num_it} iterations, "
        f"{'linear' if args.linear else 'exponential'}"
    )


def run_sweeps(args: argparse.Namespace, trainer: Trainer, sweeps: list[Sweep]) -> None:
    """One for each combination, all on the same batches, to `sweeps`; a stopped one is the last."""
    planned = combinations(args)
    recorder: SweepRecorder = NullSweepRecorder()
    if trainer.world.is_main:
        recorder = SweepRecorder(args.output, len(planned) * args.num_it)
    recorder.start(0, [])
    try:
        for index, (weight_decay, momentum) in enumerate(planned):
            if weight_decay is None:
                weight_decay = trainer.plan.recipe.weight_decay
            sweep = lr_find2(
                trainer,
                args.start_lr,
                args.end_lr,
                args.num_it,
                weight_decay,
                args.linear,
                not args.no_stop_dv,
                momentum=momentum,
                on_record=partial(recorder.record, index, weight_decay, trainer.clock),
            )
            sweeps.append(sweep)
            recorder.end_of_sweep(index, len(planned), sweep)
            if sweep.ended == "stopped":
                break
    finally:
        trainer.train_loader.close()
        trainer.eval_loader.close()
        recorder.close()
    recorder.unwritten.check()


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
