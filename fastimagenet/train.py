"""`python -m fastimagenet.train`: a folder of images in, a trained and reported network out.

Flags -> RunConfig -> `fastimagenet.run.train`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastimagenet import cli, run
from fastimagenet.config import OPTIMIZER_BACKENDS, EntryFacts, RunConfig
from fastimagenet.distributed.world import Launch, seconds_since_launch
from fastimagenet.recipes import RECIPES, toml
from fastimagenet.sinks import PACKAGES
from fastimagenet.training.clock import Stopwatch
from pipelines.cli import Parser, make_parser


def parser() -> Parser:
    """Build the parser with all flags of the command."""
    result = make_parser(
        "fastimagenet.train",
        "Train an image classifier: DALI, progressive resizing, 1cycle, DDP, mixed precision.",
        "python -m fastimagenet.train --data imagenet --recipe imagenet --output runs/first",
    )
    cli.add_machine_flags(result)
    cli.add_run_flags(result, "runs/RECIPE-TIME")
    cli.add_deterministic_flag(result)
    add = result.add_argument
    add(
        "--epochs",
        type=int,
        metavar="E",
        help="stretch the recipe's phases and schedule to E epochs",
    )
    add(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help='resume from PATH; "auto" resumes from --output if it holds a checkpoint',
    )
    add(
        "--bucket-mb",
        type=float,
        default=RunConfig.bucket_mb,
        metavar="MB",
        help=f"size of a DDP gradient bucket, MiB; default {RunConfig.bucket_mb}",
    )
    add(
        "--checkpoint-steps",
        type=int,
        default=RunConfig.checkpoint_steps,
        metavar="M",
        help="save a checkpoint every M steps, and at epoch ends; 0: only there; default "
        f"{RunConfig.checkpoint_steps}",
    )
    add(
        "--max-restarts",
        type=int,
        default=Launch.max_restarts,
        metavar="R",
        help="restart all processes from the last checkpoint when one dies, R times; not after "
        f"an error that would come again; default {Launch.max_restarts}",
    )
    add(
        "--optimizer-backend",
        choices=OPTIMIZER_BACKENDS,
        default=RunConfig.optimizer_backend,
        help="apex: the fused optimizer of NVIDIA apex, where installed",
    )
    add(
        "--stop-at-target",
        action="store_true",
        help="end the run at the evaluation that reaches the recipe's target",
    )
    add(
        "--log",
        action="append",
        choices=tuple(PACKAGES),
        default=[],
        help="log the rows to this tool, too; repeatable",
    )
    add("--profile", action="store_true", help="trace ten steps into --output/profile")
    add("--author", default=EntryFacts.author, help="author of the DAWNBench entry")
    add("--author-email", default=EntryFacts.author_email, metavar="ADDRESS", help="of that entry")
    add("--hardware", help="default: detected, such as 1 x NVIDIA H200")
    add("--cost-per-hour", type=float, metavar="USD", help="on-demand price of all machines")
    add("--dry-run", action="store_true", help="print the plan and exit")
    add("--list-recipes", action="store_true", help="print names and first lines and exit")
    add("--print-recipe", action="store_true", help="print the recipe as TOML and exit")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status. Raises UserError for the user's mistakes."""
    clock = Stopwatch(seconds_since_launch())
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    if args.list_recipes:
        for name, make in RECIPES.items():
            print(f"{name:28} {(make.__doc__ or '').splitlines()[0]}")  # noqa: T201
        return 0
    elastic = args.nodes[0] > 0
    config = cli.run_config(
        args,
        elastic=True,
        resume="auto" if elastic and args.resume is None else args.resume,
        checkpoint_steps=args.checkpoint_steps,
        bucket_mb=args.bucket_mb,
        optimizer_backend=args.optimizer_backend,
        deterministic=args.deterministic,
        stop_at_target=args.stop_at_target,
        log=tuple(args.log),
        profile=args.profile,
        entry=EntryFacts(
            author=args.author,
            author_email=args.author_email,
            hardware=args.hardware,
            cost_per_hour=args.cost_per_hour,
        ),
    )
    if args.print_recipe:
        print(toml.dumps(config.recipe), end="")  # noqa: T201
        return 0
    if args.dry_run:
        print(run.dry_run(config))  # noqa: T201
        return 0
    status, _ = run.train(config, argv, clock)
    return status


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
