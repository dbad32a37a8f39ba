"""Before renting the machines: what fits into a budget, predicted from a minute on this one.

    python -m benchmarks.plan --data DIR --minutes 30 --nodes 4 --gpus 8 --price 98.32

Loader, model, evaluation and checkpoints of the recipe are measured on one device here; from their
rates the time of the run is predicted, and the epochs that fit. Accuracies are expected from tables
that others have published, where there are any. The chosen recipe is written as TOML for train.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from fastimagenet.assemble import check_output, chosen_recipe, read_data, with_copies

from benchmarks.plan_results import check, table, write_results
from benchmarks.planner import MIN_STEPS, candidates, with_fitting_batch
from fastimagenet import cli
from fastimagenet.distributed.world import World
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.training.clock import Stopwatch
from pipelines.cli import Parser, at_least, make_parser, output_folder, positive
from pipelines.datasets.known import dataset_name
from pipelines.environment import versions
from pipelines.errors import UserError

PASSED_ON = ("data", "skip_list", "on_bad_image", "backend", "device", "seed", "timeout")
"""Flags that train has with the same defaults."""


def parser() -> Parser:
    """All flags of the command."""
    result = make_parser(
        "benchmarks.plan",
        "Predict what a recipe takes on machines like this one, and scale it to a budget.",
        "python -m benchmarks.plan --data imagenet --minutes 30 --nodes 4 --price 98.32",
    )
    cli.add_machine_flags(result)
    cli.add_run_flags(result, "runs/plan-RECIPE-TIME", output_folder)
    add = result.add_argument
    help_text = "no probe: set this finished run of --output/recipe.toml beside its prediction"
    add("--check", type=Path, metavar="RUN", help=help_text)
    add("--minutes", type=positive, metavar="M", help="wall time that the run may take")
    add("--gpus", type=at_least(1), metavar="K", help="of a node; default: those of this one, or 1")
    add("--price", type=float, metavar="USD", help="of one node for an hour, on demand")
    add("--target", metavar="METRIC=VALUE", help="top5=0.93, top1=0.94; default: the recipe's")
    add(
        "--probe-seconds",
        type=positive,
        default=60.0,
        metavar="S",
        help="of measuring, about, start-up aside; default 60",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    clock = Stopwatch()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    if args.check is not None:
        if args.output is None:
            raise UserError("--check needs --output: the folder that the plan was written to")
        print(check(args.output, args.check))
        return 0
    check_numbers(args)
    recipe = chosen_recipe(args)
    if args.target is not None:
        recipe = replace(recipe, target=args.target)
    nodes = args.nodes[1]
    # Only this machine is probed, and it meets no other.
    launch = cli.launch_of(argparse.Namespace(**vars(args) | {"nodes": (0, 1)}))
    gpus = args.gpus or launch.nproc_per_node
    world_size = nodes * gpus
    if args.output is None:
        args.output = Path("runs") / f"plan-{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_output(args.output)
    world = World(local_world_size=gpus, device="cpu" if launch.device == "cpu" else "cuda:0")
    train, val = read_data(args, world)
    asked, recipe = recipe, with_fitting_batch(recipe, world_size, len(train))
    Plan.of(recipe, world_size, len(train))

    from benchmarks.probe import measure

    probed = with_copies(recipe, cli.data_folder(args))
    probe, hardware, precision = measure(args, probed, world, train, val, clock, args.probe_seconds)
    dataset = dataset_name(train.classes)
    found = candidates(
        recipe,
        probe,
        dataset=dataset,
        nodes=nodes,
        world_size=world_size,
        budget_seconds=60 * args.minutes,
        node_price=args.price,
    )
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.plan", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware_probed": hardware,
        "precision": precision,
        "versions": versions(),
        "data": dataset or cli.data_name(args),
        "nodes": nodes,
        "gpus_per_node": gpus,
        "minutes": args.minutes,
        "node_usd_per_hour": args.price,
        "probe": asdict(probe),
    }
    write_results(result, found, args.output)
    print(f"\n{table(result, found)}\nall of it: {args.output}", flush=True)
    if note := batch_note(asked, recipe):
        print(note)
    command = ["python", "-m", "fastimagenet.train", *train_flags(args)]
    print(f"train it: {shlex.join(command)}")
    return 0


def batch_note(asked: Recipe, planned: Recipe) -> str:
    """What the plan has changed about the recipe's batches; "" where it is nothing."""
    before, after = ([phase.batch_size for phase in recipe.phases] for recipe in (asked, planned))
    if before == after:
        return ""
    return (
        f"batch size a process: {', '.join(map(str, after))} in place of the recipe's "
        f"{', '.join(map(str, before))}, so that an epoch has at least {MIN_STEPS} updates; "
        "the LR in proportion"
    )


def train_flags(args: argparse.Namespace) -> list[str]:
    """Of the run that was predicted; what else was given is in recipe.toml."""
    flags = ["--recipe", str(args.output / "recipe.toml")]
    for name in PASSED_ON:
        value = getattr(args, name)
        if value != parser().get_default(name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    if processes := args.gpus or args.nproc_per_node:
        flags += ["--nproc-per-node", str(processes)]
    if (nodes := args.nodes[1]) > 1:
        flags += ["--nodes", str(nodes), "--rdzv-endpoint", args.rdzv_endpoint or "HOST:PORT"]
    return flags


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UserError naming the flag."""
    if args.minutes is None:
        raise UserError("--minutes M is required: the wall time that the run may take")
    if args.global_batch is not None:
        raise UserError("--global-batch: the batches are the recipe's; --set phases.0.batch_size=N")
    if args.price is not None and not 0 <= args.price < 1e9:
        raise UserError(f"--price must be a number of US dollars, not {args.price}")


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
