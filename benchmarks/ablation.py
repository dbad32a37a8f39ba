"""What each part of a recipe gives: trained whole, and with one part switched off at a time.

    python -m benchmarks.ablation --data CIFAR10 --runs 3

Without more, each is trained for the recipe's length, and accuracies are compared. With --lengths
each is trained for the first of these numbers of epochs, then for the next, until it reaches
--target, and times are compared: what a part gives in seconds.

Every run is a `python -m fastimagenet.train` of its own, in OUTPUT/PART-seedS. The same command
resumes where it was stopped, and repeats no run that is finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.matrix import (
    Data,
    Matrix,
    Training,
    Variant,
    add_matrix_flags,
    describe,
    measured,
    variant,
)
from benchmarks.common.measuring import begin, by_column, command_parser, document, write_result
from benchmarks.common.statistics import interval, interval_text
from fastimagenet import cli
from fastimagenet.config import changed_recipe, chosen_recipe
from fastimagenet.recipes.recipe import Recipe
from pipelines.cli import at_least
from pipelines.errors import UserError
from pipelines.files import Row
from pipelines.formats import duration, percent

TO_TARGET = "time_to_target_seconds"
"""In a summary: the training clock where the target was reached; null where it was missed."""
FULL = "all"
"""The name of the runs in which nothing is switched off."""
PEER_LR_PER_IMAGE = 11.5 / (1024 * (1 + 1 / 0.15))
PEER_DECAY_PER_IMAGE = 0.0153 / (1024 * (1 + 1 / 0.15))
"""Of airbench94, which trains the same network by SGD: LR, and LR times weight decay."""


def without_muon(recipe: Recipe) -> list[str]:
    """Train by SGD at the rates that airbench94 has for it."""
    lr = PEER_LR_PER_IMAGE * recipe.phases[0].batch_size
    decay = PEER_DECAY_PER_IMAGE / PEER_LR_PER_IMAGE
    return ["optimizer=sgd", f"max_lr={lr:.4g}", f"weight_decay={decay:.4g}"]


def without_growing(recipe: Recipe) -> list[str]:
    """Train every phase at the size of the last one."""
    last = recipe.phases[-1].image_size
    return [f"phases.{index}.image_size={last}" for index in range(len(recipe.phases))]


PARTS: dict[str, Callable[[Recipe], list[str]]] = {
    "whitening": lambda _: ["whitening=false"],
    "dirac_init": lambda _: ["dirac_init=false"],
    "bias_lr_factor": lambda _: ["bias_lr_factor=1"],
    "label_smoothing": lambda _: ["label_smoothing=0"],
    "alternating_flip": lambda _: ["alternating_flip=false"],
    "ema_decay": lambda _: ["ema_decay=0"],
    "optimizer": without_muon,
    "image_size": without_growing,
    "resnet_d": lambda _: ["resnet_d=false"],
    "silu": lambda _: ["silu=false"],
    "blur_pool": lambda _: ["blur_pool=false"],
    "precision": lambda _: ["precision=fp32"],
}
"""Recipe field -> the settings that switch it off. TTA is in every row, on and off."""
LOADER = "loader"
"""With --lengths a part, too: `--backend torchvision` in its place."""


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
    help_text = f"some of {', '.join(PARTS)} and, with --lengths, {LOADER}"
    add("--only", nargs="+", choices=[*PARTS, LOADER], metavar="FIELD", help=help_text)
    add_matrix_flags(parser, 3, Path("runs/ablation"))
    help_text = "epochs, ascending: compare times to the target"
    add("--lengths", nargs="+", type=at_least(1), metavar="E", help=help_text)
    add("--target", metavar="METRIC=VALUE", help="with --lengths; default: the recipe's")
    args, about = begin(parser, argv)
    data = describe(args.data)
    seeds = range(args.seed, args.seed + args.runs)
    if args.lengths:
        return compare_times(args, data, seeds, about["command"])
    matrix = Matrix.of(variants(args, data.train_images), seeds, args.output, args.data)
    status = matrix.run()
    if any(training.run == FULL for training in matrix.finished):
        result = read_ablation(matrix.finished, data, about["command"])
        write_result(args.output, "ablation", result, table(result))
        print(f"\n{table(result)}\ntable and JSON: {args.output}", flush=True)
    else:
        print("\nno run of the whole recipe is finished: no table yet")
    return status


def compare_times(args: argparse.Namespace, data: Data, seeds: Sequence[int], command: str) -> int:
    """Train all variants for each number of epochs until they reach the target; write the times.

    Returns the exit status. Raises UserError naming --lengths or --target.
    """
    if args.epochs is not None:
        raise UserError("--epochs: --lengths has the numbers of epochs")
    args.set += [f"target={args.target}"] if args.target else []
    whole, _ = changed_recipe(chosen_recipe(args.recipe)[0], args.set)
    if whole.target_metric is None:
        raise UserError(f"--lengths: recipe {args.recipe} has no target: --target top1=0.70")
    status, trainings = 0, []
    for seed in seeds:
        reached: set[str] = set()
        for epochs in sorted(set(args.lengths)):
            args.epochs = epochs
            todo = [v for v in variants(args, data.train_images) if v.name not in reached]
            folder = args.output / f"{epochs}-epochs"
            matrix = Matrix.of(todo, [seed], folder, args.data)
            status = status or matrix.run()
            if status:
                break
            trainings += matrix.finished
            reached |= {one.run for one in matrix.finished if one.summary[TO_TARGET] is not None}
    if not any(one.run == FULL for one in trainings):
        print("\nno run of the whole recipe is finished: no table yet")
        return status
    result = read_times(trainings, data, command)
    write_result(args.output, "times", result, times_table(result))
    print(f"\n{times_table(result)}\ntable and JSON: {args.output}", flush=True)
    return status


def read_times(trainings: Sequence[Training], data: Data, command: str) -> Row:
    """Return the time to the target of each part's shortest run that reached it, in plain values.

    A row's `runs` are those of all lengths; its `seconds` and `ratio`, to the whole recipe seed by
    seed, are null unless every seed has reached the target.
    """
    times: dict[tuple[str, int], float] = {}
    for one in trainings:
        if one.summary[TO_TARGET] is not None:
            times[one.run, one.seed] = one.summary[TO_TARGET]
    rows = []
    for run in dict.fromkeys(one.run for one in trainings):
        own = [one for one in trainings if one.run == run]
        seeds = sorted({one.seed for one in own})
        row: Row = {"run": run, "seeds": seeds, "seconds": None, "ratio": None}
        if all((run, seed) in times for seed in seeds):
            found = [times[run, seed] for seed in seeds]
            row["seconds"] = interval(found) | {"values": found}
            if run != FULL and all((FULL, seed) in times for seed in seeds):
                ratios = [times[run, seed] / times[FULL, seed] for seed in seeds]
                row["ratio"] = interval(ratios) | {"values": ratios}
        names = (TO_TARGET, "epochs", "top1", "train_seconds", "wall_seconds", "time_split_seconds")
        row["runs"] = [
            {"seed": one.seed} | {name: one.summary[name] for name in names} for one in own
        ]
        rows.append(row)
    summaries = [one.summary for one in trainings]
    about = {"recipe": summaries[0]["recipe"], "target": summaries[0]["target"]}
    return measured(summaries, command) | about | {"data": asdict(data), "rows": rows}


def times_table(result: Row) -> str:
    """Format the times to the target as Markdown."""
    target = result["target"]
    return document(
        f"# Recipe {result['recipe']} to {percent(target['value'])} {target['metric']}, one part "
        "switched off at a time",
        f"{result['hardware']}; {result['precision']}; torch {result['versions']['torch']}; "
        f"{result['date']}; {Data(**result['data']).counts}.",
        by_column([time_cells(row) for row in result["rows"]]),
        "Training clock of the shortest run that reached the target; epochs: the lengths trained, "
        "of each seed; means over n seeds, with 95 % intervals for n > 1. Data: the share of the "
        "training clock in which the last run waited for images.",
    )


def time_cells(row: Row) -> dict[str, str]:
    """Format the row of one part, by column."""
    last = row["runs"][-1]
    waiting = last["time_split_seconds"]["data_wait"] / last["train_seconds"]
    return {
        "switched off": "nothing" if row["run"] == FULL else row["run"],
        "n": str(len(row["seeds"])),
        "to target": interval_text(row["seconds"], duration) if row["seconds"] else "missed",
        "ratio": interval_text(row["ratio"], "{:.2f}".format) if row["ratio"] else "-",
        "epochs": ", ".join(str(run["epochs"]) for run in row["runs"]),
        "top-1 of the last": percent(last["top1"]),
        "data": percent(waiting),
    }


def variants(args: argparse.Namespace, num_train: int) -> list[Variant]:
    """Return the recipe and the recipe without each part that it has.

    Raises UserError for a part that was asked for and that the recipe does not have.
    """
    found = [variant(args, FULL, args.recipe, num_train)]
    whole, _ = changed_recipe(chosen_recipe(args.recipe)[0], args.set)
    for part in args.only or [*PARTS, LOADER]:
        if part == LOADER and args.lengths and args.backend != "torchvision":
            other = argparse.Namespace(**vars(args) | {"backend": "torchvision"})
            found.append(variant(other, part, args.recipe, num_train))
        elif part != LOADER and has(whole, part):
            found.append(variant(args, part, args.recipe, num_train, PARTS[part](whole)))
        elif args.only:
            why = f"recipe {args.recipe} does not use it"
            if part == LOADER:
                why = "it takes --lengths, and a --backend that is not torchvision"
            raise UserError(f"--only {part}: {why}")
    return found


def has(recipe: Recipe, part: str) -> bool:
    """Return whether the recipe uses it, that is, whether there is something to switch off."""
    if part == "image_size":
        return len({phase.image_size for phase in recipe.phases}) > 1
    if part == "optimizer":
        return recipe.optimizer != "sgd"
    return getattr(recipe, part) != getattr(Recipe, part)


def read_ablation(finished: Sequence[Training], data: Data, command: str) -> Row:
    """Return all that is finished, in plain values: times in seconds, accuracies as fractions.

    Differences to the whole recipe, in points of `judged`, are means over the seeds that both have.
    At least one run of the whole recipe must be finished.
    """
    summaries = {(training.run, training.seed): training.summary for training in finished}
    values = list(summaries.values())
    judged = "top1" if values[0]["tta_top1"] is None else "tta_top1"
    rows = []
    for run in dict.fromkeys(run for run, _ in summaries):
        own = {seed: summary for (name, seed), summary in summaries.items() if name == run}
        points = [
            100 * (summary[judged] - summaries[FULL, seed][judged])
            for seed, summary in own.items()
            if (FULL, seed) in summaries
        ]
        row: Row = {"run": run, "seeds": list(own)}
        for name in ("top1", "tta_top1", "train_seconds", "wall_seconds"):
            found = [summary[name] for summary in own.values()]
            row[name] = None if None in found else interval(found) | {"values": found}
        differs = points and run != FULL
        row["difference_points"] = (
            interval(points, signed=True) | {"values": points} if differs else None
        )
        row["summaries"] = list(own.values())
        rows.append(row)
    about = {"recipe": values[0]["recipe"], "epochs": values[0]["epochs"]}
    return (
        measured(values, command) | about | {"data": asdict(data), "judged": judged, "rows": rows}
    )


def table(result: Row) -> str:
    """Format the result as Markdown."""
    name = "with TTA" if result["judged"] == "tta_top1" else "plain"
    return document(
        f"# Recipe {result['recipe']}, one part switched off at a time",
        f"{result['hardware']}; {result['precision']}; torch {result['versions']['torch']}; "
        f"{result['date']}; {result['epochs']} epochs; {Data(**result['data']).counts}.",
        by_column([cells(row) for row in result["rows"]]),
        f"Means over n seeds, with 95 % intervals for n > 1; differences to the first row {name}, "
        "seed by seed. Train: the training clock; wall: everything.",
    )


def cells(row: Row) -> dict[str, str]:
    """Format the row of one part, by column."""

    def text(name: str, one: Callable[[float], str] = percent) -> str:
        return "-" if row[name] is None else interval_text(row[name], one)

    return {
        "switched off": "nothing" if row["run"] == FULL else row["run"],
        "n": str(len(row["seeds"])),
        "top-1": text("top1"),
        "with TTA": text("tta_top1"),
        "difference (points)": text("difference_points", "{:+.2f}".format),
        "train": duration(row["train_seconds"]["mean"]),
        "wall": duration(row["wall_seconds"]["mean"]),
    }


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
