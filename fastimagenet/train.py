"""`python -m fastimagenet.train`: a folder of images in, a trained and reported network out.

Flags -> Recipe -> World -> Trainer -> the files of the run.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

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
from fastimagenet.distributed.collectives import gather_objects, process_group
from fastimagenet.distributed.launch import run_processes
from fastimagenet.distributed.world import (
    World,
    launched_world,
    restarted,
    seconds_since_launch,
    started_by_us,
)
from fastimagenet.recipes import RECIPES
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.optimizer import BACKENDS as OPTIMIZER_BACKENDS
from fastimagenet.training.recorder import Recorder
from pipelines.cli import Parser, make_parser
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError


def parser() -> Parser:
    """All flags of the command."""
    result = make_parser(
        "fastimagenet.train",
        "Train an image classifier: DALI, progressive resizing, 1cycle, DDP, mixed precision.",
        "python -m fastimagenet.train --data imagenet --recipe imagenet --output runs/first",
    )
    cli.add_machine_flags(result)
    cli.add_run_flags(result, "runs/RECIPE-TIME")
    add = result.add_argument
    add("--epochs", type=int, metavar="E", help="stretch the recipe, LR and phases, to E epochs")
    add(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on from a checkpoint; auto: from the one in --output, if there is one",
    )
    add(
        "--bucket-mb",
        type=float,
        default=25,
        metavar="MB",
        help="gradients that are exchanged at once; default 25",
    )
    add(
        "--checkpoint-steps",
        type=int,
        default=1000,
        metavar="M",
        help="save every M updates and at epoch ends; 0: at epoch ends only; default 1000",
    )
    add(
        "--max-restarts",
        type=int,
        default=3,
        metavar="R",
        help="of several processes, when one dies: start all again from the last checkpoint, up to "
        "R times; default 3",
    )
    add(
        "--optimizer-backend",
        choices=OPTIMIZER_BACKENDS,
        default="torch",
        help="apex: the fused optimizer of NVIDIA apex, where installed",
    )
    add(
        "--stop-at-target",
        action="store_true",
        help="end after the evaluation that reaches the recipe's target",
    )
    add("--profile", action="store_true", help="trace ten steps into --output/profile")
    add("--author", default="anonymous", help="for the DAWNBench entry, as are the next four")
    add("--author-email", default="unknown", metavar="ADDRESS")
    add("--hardware", help="default: what is found, such as 1 x NVIDIA H200")
    add("--cost-per-hour", type=float, metavar="USD", help="on-demand price of all machines")
    add("--dry-run", action="store_true", help="print the plan and leave")
    add("--list-recipes", action="store_true", help="print names and first lines and leave")
    add("--print-recipe", action="store_true", help="print the recipe as TOML and leave")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    clock = Stopwatch(seconds_since_launch())
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    if args.list_recipes:
        for name, make in RECIPES.items():
            print(f"{name:28} {(make.__doc__ or '').splitlines()[0]}")  # noqa: T201
        return 0
    check_numbers(args)
    recipe = chosen_recipe(args)
    if args.epochs is not None:
        recipe = recipe.stretched(args.epochs)
    if args.print_recipe:
        print(recipe_toml.dumps(recipe), end="")  # noqa: T201
        return 0
    if args.stop_at_target and not recipe.target:
        raise UserError("--stop-at-target needs a target, such as --set target=top1=0.94")
    if args.nodes[0]:
        check_elastic(args)
    recipe = with_copies(recipe, cli.data_folder(args))
    launch = replace(cli.launch_of(args, elastic=True), max_restarts=args.max_restarts)
    world = launched_world(launch, args.nproc_per_node)
    world_size = launch.world_size if world is None else world.world_size
    if args.dry_run:
        data = cli.data_folder(args)
        train = read_split(data, "train", args.skip_list, check_files=False)
        print(Plan.of(recipe, world_size, len(train), args.global_batch).describe())  # noqa: T201
        return 0
    train, val = read_data(args, world)
    plan = Plan.of(recipe, world_size, len(train), args.global_batch)
    if args.output is None:
        args.output = default_output(args.resume, recipe.name)
        argv += ["--output", str(args.output)]
    if checks_flags(world):
        check_output(args.output, resuming=goes_on(args))
    if world is None:
        if launch.world_size > 1:
            before = sum(clock.read().values())
            return run_processes(launch, "fastimagenet.train", argv, before)
        world = World(device="cpu" if launch.device == "cpu" else "cuda:0")
    with process_group(world, args.timeout):
        return train_and_report(args, plan, world, train, val, clock, argv)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UserError for flags that would only be found wrong later on."""
    check_entry_flags(args)
    for flag, number in (
        ("--checkpoint-steps", args.checkpoint_steps),
        ("--max-restarts", args.max_restarts),
    ):
        if number < 0:
            raise UserError(f"{flag} must be 0 or more, not {number}")
    if not 0 < args.bucket_mb < math.inf:
        raise UserError(f"--bucket-mb must be above 0, not {args.bucket_mb:g}")


def check_entry_flags(args: argparse.Namespace) -> None:
    """Raise UserError for what would spoil the DAWNBench entry once the training is over."""
    for flag, text in (
        ("--author", args.author),
        ("--author-email", args.author_email),
        ("--hardware", args.hardware),
    ):
        if text is not None and not text.strip():
            raise UserError(f"{flag} must not be empty: DAWNBench requires it")
    cost = args.cost_per_hour
    if cost is not None and not 0 <= cost < math.inf:
        raise UserError(f"--cost-per-hour must be a number of US dollars, not {cost}")


def check_elastic(args: argparse.Namespace) -> None:
    """With --nodes MIN:MAX every start goes on by itself. Raises UserError for other flags."""
    if args.output is None:
        raise UserError("--nodes MIN:MAX needs --output DIR, the same folder on every node")
    if args.resume not in (None, "auto"):
        raise UserError(f"--resume {args.resume}: with --nodes MIN:MAX only --resume auto")
    args.resume = "auto"


def default_output(resume: str | None, name: str) -> Path:
    """Where a run without --output goes: on in the folder of its checkpoint, or to a new one."""
    if resume == "auto":
        raise UserError("--resume auto needs the --output folder of the run to go on with")
    if resume is not None:
        return Path(resume).resolve().parent.parent
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def goes_on(args: argparse.Namespace) -> bool:
    """Whether --resume names the run that --output holds."""
    resume, folder = args.resume, args.output
    return resume == "auto" or (
        resume is not None and folder.resolve() in Path(resume).resolve().parents
    )


def train_and_report(
    args: argparse.Namespace,
    plan: Plan,
    world: World,
    train: Split,
    val: Split,
    clock: Stopwatch,
    argv: list[str],
) -> int:
    """What one process does: model, training, and on rank 0 the files of the run."""
    from fastimagenet.errors import Stopped
    from fastimagenet.report.summary import write_results
    from fastimagenet.training.profiling import StepProfiler
    from fastimagenet.training.trainer import resume

    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    # Named after the time, it may have another name on another node.
    args.output = gather_objects(args.output, world, "the choice of the folder")[0]
    trainer = make_trainer(
        *(args, plan, world, train, val, clock),
        recorder=Recorder(args.output, plan.total_steps) if world.is_main else None,
        folder=args.output,
        optimizer_backend=args.optimizer_backend,
        checkpoint_steps=args.checkpoint_steps,
        bucket_mb=args.bucket_mb,
    )
    trainer.stop_at_target = args.stop_at_target
    # What our launcher has let pass and starts again goes on with what it has left itself.
    flag = "auto" if restarted() or (args.resume is None and started_by_us()) else args.resume
    if flag is not None:
        resume(trainer, args.output, flag, elastic=bool(args.nodes[0]))
        has_results = (args.output / "summary.json").exists()
        if trainer.over and gather_objects(has_results, world, "a check")[0]:
            cli.say(world, f"the run in {args.output} is finished: nothing is left to train")
            return 0
    if args.profile and world.is_main:
        trainer.profiler = StepProfiler(args.output / "profile", trainer.device)
    if world.is_main:
        write_plan(args.output, plan, train, val)
    cli.say(world, plan.describe())
    stopped_by = cli.stop_on_signals(trainer)
    unwritten = trainer.recorder.unwritten
    try:
        trainer.fit()
    except Stopped:
        unwritten.share(world)
        unwritten.check()
        flags = f"--output {shlex.quote(str(args.output))} --resume auto"
        cli.say(world, f"stopped at step {trainer.step}; go on with {flags}")
        return cli.stopped_status(stopped_by)
    unwritten.share(world)
    if world.is_main:
        command = shlex.join(["python", "-m", "fastimagenet.train", *argv])
        write = partial(write_results, args, trainer, val, started, command)
        if unwritten.attempt("summary.json, report.html and dawnbench/", write):
            cli.say(world, f"report: {args.output / 'report.html'}")
    unwritten.check()
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
