"""A recipe, then other programs' trainings, in one sitting and to the same accuracy.

    python -m benchmarks.peers --data DIR --recipe imagewoof-5 --peer "timm=COMMAND"

Ours is trained first and to its end. Then every peer's command runs, unchanged: its accuracies are
read from what it prints, and it is ended at the target, or after --limit times our time to it.
Results and logs are in OUTPUT. The same command repeats nothing that is finished; what was stopped
begins anew, as its time would not be known.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.matrix import Data, Matrix, add_training_flags, describe, variant
from benchmarks.common.measuring import begin, by_column, command_parser, document, write_result
from benchmarks.common.statistics import short
from benchmarks.dawnbench import target_recipe
from benchmarks.peers.watching import OURS, READERS, Contestant, watch
from fastimagenet import cli
from fastimagenet.config import changed_recipe, chosen_recipe
from pipelines.cli import at_least, output_folder, positive
from pipelines.errors import UserError
from pipelines.files import Row, read_object, write_object
from pipelines.formats import duration, percent

OUR_NAME = "ours"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="image folder, for ours")
    add("--recipe", required=True, metavar="NAME", help="ours, or FILE.toml")
    add("--target", metavar="top1=VALUE", help="default: the recipe's")
    help_text = f"NAME: {', '.join(READERS)}, or one of them and more, such as timm-20; repeatable"
    add("--peer", action="append", type=peer, required=True, metavar="NAME=COMMAND", help=help_text)
    help_text = "end a peer after so many times our wall time to the target; default 4"
    add("--limit", type=positive, default=4.0, metavar="FACTOR", help=help_text)
    add("--seed", type=at_least(0), default=0, metavar="S", help="ours; default 0")
    default = Path("runs/peers")
    add("--output", type=output_folder, default=default, metavar="DIR", help=f"default {default}")
    add_training_flags(parser)
    args, about = begin(parser, argv)
    names = [one.name for one in args.peer]
    if len(set(names)) < len(names):
        raise UserError(f"--peer {', '.join(names)}: each needs a name of its own, as in timm-20")
    data = describe(args.data)
    ours, folder, mark = our_training(args, data)
    contestants = [ours, *args.peer]
    rows = [kept(args.output, one, mark) for one in contestants]
    for index, one in enumerate(contestants):
        limit = None if one is ours else args.limit * rows[0]["wall_seconds"]
        if is_done(rows[index], limit):
            print(f"{one.name}: finished before, in {args.output}", flush=True)
        else:
            if one is ours:
                shutil.rmtree(folder, ignore_errors=True)  # what a stopped call has left
            rows[index] = watch(one, mark, limit, args.output / f"{one.name}.log")
            if rows[index]["outcome"] != "failed":
                write_object(args.output / f"{one.name}.json", rows[index])
        if one is ours and rows[0]["outcome"] != "reached":
            print("without our time to the target no peer is run", file=sys.stderr)
            return 1
    result = about | {"data": asdict(data), "target": mark, "limit": args.limit}
    result["rows"] = [figures(row, rows[0], data.train_images) for row in rows]
    write_result(args.output, "peers", result, table(result))
    print(f"\n{table(result)}\ntable, JSON and logs: {args.output}", flush=True)
    return int(any(row["outcome"] == "failed" for row in rows))


def peer(text: str) -> Contestant:
    """An argparse type: NAME=COMMAND, NAME being one of READERS, and more after a hyphen."""
    name, _, command = text.partition("=")
    package = name.partition("-")[0]
    if package not in READERS or not re.fullmatch(r"[\w.-]+", name):
        known = ", ".join(READERS)
        raise ArgumentTypeError(f"NAME must be one of {known}, or such as timm-20; not {name!r}")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ArgumentTypeError(f"{name}: {error} in {command!r}") from None
    if not words or shutil.which(words[0]) is None:
        raise ArgumentTypeError(f"{name}: there is no program {words[0] if words else ''!r}")
    reader, packages = READERS[package], tuple(dict.fromkeys((package, "torch")))
    return Contestant(name=name, words=words, reader=reader, packages=packages)


def our_training(args: argparse.Namespace, data: Data) -> tuple[Contestant, Path, float]:
    """Return our training, its folder, and the top-1 to reach, a fraction. Raises UserError."""
    recipe, _ = changed_recipe(chosen_recipe(args.recipe)[0], args.set)
    recipe = target_recipe(recipe, args.target)
    metric, mark = recipe.target_metric or ("", 0.0)
    if metric != "top1":
        raise UserError(f"--target {recipe.target}: peers are read for top-1 alone: name a top1=")
    own = variant(args, OUR_NAME, args.recipe, data.train_images, [f"target={recipe.target}"])
    matrix = Matrix.of([own], [args.seed], args.output, args.data, folder=lambda name, _: name)
    (training,) = matrix.trainings
    words = [sys.executable, "-m", "fastimagenet.train", *training.flags]
    return Contestant(name=OUR_NAME, words=words, reader=OURS), training.folder, mark


def kept(output: Path, one: Contestant, mark: float) -> Row:
    """Return what an earlier call has left of it, {} if nothing. UserError if it was another."""
    path = output / f"{one.name}.json"
    if not path.exists():
        return {}
    found = read_object(path)
    if (found["command"], found["target"]) != (one.command, mark):
        raise UserError(
            f"--output: {path} is of another command or target: repeat those, or name another "
            "folder"
        )
    return found


def is_done(row: Row, limit: float | None) -> bool:
    """Tell whether there is a result that another run, to this limit, would not go beyond."""
    return bool(row) and (row["outcome"] != "limit" or limit is None or row["seconds"] >= limit)


def figures(row: Row, ours: Row, train_images: int) -> Row:
    """Add the last accuracy, images/s, and the ratio of our wall time to the peer's.

    For a peer that the limit has ended the ratio is to that limit: it is below that. None: not
    known.
    """
    last = row["epochs"][-1] if row["epochs"] else None
    theirs = row["seconds"] if row["outcome"] == "limit" else row["wall_seconds"]
    return row | {
        "top1": last and last["top1"],
        "images_per_sec": last and train_images * epochs_done(row) / last["train_seconds"],
        "ratio": theirs and ours["wall_seconds"] / theirs,
    }


def epochs_done(row: Row) -> int:
    """Count the epochs up to the last accuracy; rows of before have no numbers, but all epochs."""
    rows = row["epochs"]
    return rows[-1].get("epoch", len(rows)) if rows else 0


def table(result: Row) -> str:
    """Format the result as Markdown."""
    notes = []
    for row in result["rows"]:
        versions = "".join(f", {name} {version}" for name, version in row["versions"].items())
        notes.append(f"- {row['name']}, {row['started']}{versions}: `{row['command']}`")
    return document(
        f"# To {percent(result['target'])} top-1 on {result['data']['name']}, with other programs",
        f"{result['hardware']}; torch {result['versions']['torch']}, "
        f"Python {result['versions']['python']}; {result['date']}; one run each; "
        f"{Data(**result['data']).counts}.",
        by_column([cells(row) for row in result["rows"]]),
        "Wall: from the start of the process to the line with the accuracy, with imports, "
        "evaluations and checkpoints. Training: ours by its training clock; theirs wall less "
        "evaluations. Ours / theirs: wall, below 1 where ours is faster. Images/s: training images "
        "x epochs / training time. Ours runs to its end; a peer ends at the target, or after "
        f"{result['limit']:g} times our wall time to it (more than), or has ended by itself before "
        "(missed).",
        "\n".join(notes),
    )


def cells(row: Row) -> dict[str, str]:
    """Format the row of one program, by column."""
    outcome, at_end = row["outcome"], duration(row["seconds"])
    walls = {"limit": f"more than {at_end}", "missed": f"missed in {at_end}", "failed": "failed"}
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return {
        "program": row["name"],
        "wall to target": walls.get(outcome, duration(row["wall_seconds"])),
        "training to target": duration(row["train_seconds"]),
        "ours / theirs": f"below {ratio}" if outcome == "limit" else ratio,
        "last top-1": percent(row["top1"]),
        "epochs": str(epochs_done(row)),
        "images/s": "-" if row["images_per_sec"] is None else short(row["images_per_sec"]),
    }


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
