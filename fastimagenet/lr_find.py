"""`python -m fastimagenet.lr_find`: which learning rate, weight decay and momentum to train with.

Flags -> RunConfig and SweepConfig -> a Trainer, as for train; then sweeps, drawn together.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fastimagenet import cli, run
from fastimagenet.config import RunConfig
from fastimagenet.distributed.processes import Processes
from fastimagenet.distributed.world import World
from fastimagenet.lr_finder.analysis import Sweep, SweepConfig, check_validation
from fastimagenet.recipes.plan import Plan
from fastimagenet.training.clock import Stopwatch
from pipelines.cli import Parser, make_parser
from pipelines.datasets.split import Split
from pipelines.errors import UserError

DESCRIPTION = """\
Find the learning rate to train with: a short training whose LR rises with every
update until the loss diverges. Only its curve is kept, drawn and analysed.

The sweep takes image size, batch size and data from the recipe's first phase;
--set changes them (phases.0.batch_size=128). The LR at which the loss falls
fastest is suggested as the recipe's max_lr. With several values of --wd or
--momentum there is one sweep for each combination; the largest weight decay
that still tolerates a high LR is the best."""


def parser() -> Parser:
    """Build the parser with all flags of the command."""
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
        help="updates per sweep, across epochs if need be; default 100",
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
        help="continue to the last update even if the loss exceeds 4 x its best or is not finite",
    )
    add(
        "--recipe-out",
        type=Path,
        metavar="FILE.toml",
        help="write the recipe with the values found to this new file, for train --recipe",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status. Raises UserError for the user's mistakes."""
    clock = Stopwatch()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    sweep = SweepConfig(
        start_lr=args.start_lr,
        end_lr=args.end_lr,
        num_it=args.num_it,
        weight_decays=tuple(args.wd or ()),
        momenta=tuple(args.momentum or ()),
        linear=args.linear,
        stop_dv=not args.no_stop_dv,
        recipe_out=args.recipe_out,
    )
    return find(cli.run_config(args), sweep, argv, clock)


def find(config: RunConfig, sweep: SweepConfig, argv: list[str], clock: Stopwatch) -> int:
    """Make the sweeps, in as many processes as the config asks for, and leave their files.

    `argv`: the flags as they were typed, for the processes that are started.
    Returns 0, or 128 + the signal's number for a sweep that was stopped.
    Raises UserError for the user's mistakes and NotWritten for files that are missing.
    """
    recipe = run.with_copies(config.recipe, config.data.root)
    processes = Processes.of(config.launch)
    if config.output is None:
        config = config.with_output("lr_find-")
        argv = [*argv, "--output", str(config.folder)]
    if processes.is_first:
        run.check_output(config.folder)
        check_recipe_out(sweep.recipe_out)
    train, val = run.read_data(config.data, processes.is_first)
    plan = Plan.of(recipe, processes.world_size, len(train), config.global_batch)
    check_validation(plan, len(val))
    val = shuffled(val, config.seed)
    command = shlex.join(["python", "-m", "fastimagenet.lr_find", *argv])
    work = partial(_find, config, sweep, plan, train=train, val=val, clock=clock, command=command)
    return processes.run("fastimagenet.lr_find", argv, work)


def shuffled(split: Split, seed: int) -> Split:
    """Return the same images in random order.

    Folders are listed by class, and each iteration is evaluated on one batch, which would hold a
    class or two.
    """
    return split.take(np.random.default_rng(seed).permutation(len(split)))


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


def _find(
    config: RunConfig,
    sweep: SweepConfig,
    plan: Plan,
    world: World,
    *,
    train: Split,
    val: Split,
    clock: Stopwatch,
    command: str,
) -> int:
    """Make the sweeps in one process; on rank 0 write and print what the command leaves."""
    from fastimagenet.lr_finder.finder import sweep_all
    from fastimagenet.lr_finder.results import write_results

    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    trainer = run.build_trainer(config, plan, world, train, val, clock)
    cli.say(world, describe(sweep, plan))
    if world.is_main:
        run.write_plan(config.folder, plan, train, val)
    sweeps: list[Sweep] = []
    with cli.stopping_on_signals(trainer) as stopped_by:
        try:
            for each in sweep_all(trainer, sweep, config.folder):
                sweeps.append(each)
        finally:  # an error in a later sweep leaves the earlier ones
            if world.is_main and sweeps:
                results = write_results(config, sweep, sweeps, trainer, val, started, command)
                cli.say(world, results)
    return cli.stopped_status(stopped_by) if sweeps[-1].ended == "stopped" else 0


def describe(sweep: SweepConfig, plan: Plan) -> str:
    """Describe what will be swept, for the terminal."""
    first = plan.phases[0]
    return (
        f"sweep: recipe {plan.recipe.name}, {plan.recipe.model}, its first phase: "
        f"{first.image_size} px, batch {first.batch_size}, global batch "
        f"{first.global_batch}, {plan.num_train:,} training images, world size {plan.world_size}\n"
        f"  lr {sweep.start_lr:g} -> {sweep.end_lr:g} in {sweep.num_it} iterations, "
        f"{'linear' if sweep.linear else 'exponential'}"
    )


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
