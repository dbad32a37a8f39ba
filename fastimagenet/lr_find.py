"""`python -m fastimagenet.lr_find`: which learning rate, weight decay and momentum to train with.

Flags -> RunConfig and SweepConfig -> `fastimagenet.run.sweep`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastimagenet import cli, run
from fastimagenet.lr_finder.sweep import SweepConfig
from fastimagenet.training.clock import Stopwatch
from pipelines.cli import Parser, make_parser

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
    cli.add_deterministic_flag(result)
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
    settings = SweepConfig(
        start_lr=args.start_lr,
        end_lr=args.end_lr,
        num_it=args.num_it,
        weight_decays=tuple(args.wd or ()),
        momenta=tuple(args.momentum or ()),
        linear=args.linear,
        stop_dv=not args.no_stop_dv,
        recipe_out=args.recipe_out,
    )
    config = cli.run_config(args, deterministic=args.deterministic)
    status, _ = run.sweep(config, settings, argv, clock)
    return status


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
