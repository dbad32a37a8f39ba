"""What each part of a recipe gives: trained whole, and with one part switched off at a time.

    python -m benchmarks.ablation --data CIFAR10 --runs 3

Without more, each is trained for the recipe's length, and accuracies are compared. With --lengths
each is trained for the first of these numbers of epochs, then for the next, until it reaches
--target, and times are compared: what a part gives in seconds.

Every run is a `python -m fastimagenet.train` of its own, in OUTPUT/PART-seedS. The same command
resumes where it was stopped, and repeats no run that is finished. The status is 1 if a run has
failed, as one does whose loss is not finite any more; the table has the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.accuracies import accuracies_table, read_accuracies
from benchmarks.ablation.parts import FULL, LOADER, PARTS, SGD_RATES, variants
from benchmarks.ablation.times import TO_TARGET, read_times, times_table
from benchmarks.common.matrix import Data, Matrix, add_matrix_flags, describe
from benchmarks.common.measuring import begin, command_parser, write_result
from fastimagenet import cli
from fastimagenet.config import changed_recipe, chosen_recipe
from pipelines.cli import at_least
from pipelines.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="image folder")
    add(
        "--recipe",
        default="cifar10-speed",
        metavar="NAME",
        help="or FILE.toml; default cifar10-speed",
    )
    help_text = f"some of {', '.join(PARTS)} and, with --lengths, {LOADER}; {SGD_RATES}"
    add("--only", nargs="+", choices=[*PARTS, LOADER], metavar="FIELD", help=help_text)
    add_matrix_flags(parser, 3, Path("runs/ablation"))
    help_text = "epochs, ascending: compare times to the target"
    add("--lengths", nargs="+", type=at_least(1), metavar="E", help=help_text)
    add("--target", metavar="METRIC=VALUE", help="with --lengths; default: the recipe's")
    args, about = begin(parser, argv)
    data = describe(args.data)
    if args.lengths:
        status, matrix = train_to_target(args, data)
        name, read, table = "times", read_times, times_table
    else:
        status, matrix = train_whole(args, data)
        name, read, table = "ablation", read_accuracies, accuracies_table
    if any(training.run == FULL for training in matrix.finished):
        result = read(matrix.finished, data, about["command"]) | {"failed": matrix.failed_text}
        write_result(args.output, name, result, table(result))
        print(f"\n{table(result)}\ntable and JSON: {args.output}", flush=True)
    else:
        print("\nno run of the whole recipe is finished: no table yet")
    return status


def seeds_of(args: argparse.Namespace) -> range:
    """Return the seeds that each part is trained with."""
    return range(args.seed, args.seed + args.runs)


def train_whole(args: argparse.Namespace, data: Data) -> tuple[int, Matrix]:
    """Train all variants for the recipe's length; return the status and what was trained."""
    todo = variants(args, data.train_images)
    matrix = Matrix.of(todo, seeds_of(args), args.output, args.data)
    return matrix.run(), matrix


def train_to_target(args: argparse.Namespace, data: Data) -> tuple[int, Matrix]:
    """Train all variants for each number of epochs until they reach the target.

    Returns the exit status and what was trained. Raises UserError naming --lengths or --target.
    """
    if args.epochs is not None:
        raise UserError("--epochs: --lengths has the numbers of epochs")
    args.set += [f"target={args.target}"] if args.target else []
    whole, _ = changed_recipe(chosen_recipe(args.recipe)[0], args.set)
    if whole.target_metric is None:
        raise UserError(f"--lengths: recipe {args.recipe} has no target: --target top1=0.70")
    status, done = 0, Matrix(trainings=[])
    for seed in seeds_of(args):
        reached: set[str] = set()
        for epochs in sorted(set(args.lengths)):
            args.epochs = epochs
            todo = [v for v in variants(args, data.train_images) if v.name not in reached]
            folder = args.output / f"{epochs}-epochs"
            matrix = Matrix.of(todo, [seed], folder, args.data)
            status = max(status, matrix.run())
            done.trainings += matrix.trainings
            done.failed += matrix.failed
            if status > 1:  # stopped by a signal
                return status, done
            reached |= {one.run for one in matrix.finished if one.summary[TO_TARGET] is not None}
    return status, done


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
