"""`python -m fastimagenet.predict CHECKPOINT PATH...`: the likeliest classes of images."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastimagenet import cli
from fastimagenet.distributed.collectives import gather_objects
from fastimagenet.distributed.processes import Processes
from fastimagenet.distributed.world import World
from fastimagenet.recipes.recipe import TOP, TTA
from pipelines.backends import start_workers
from pipelines.cli import Parser, at_least, make_parser, output_file
from pipelines.datasets.given import given_images
from pipelines.datasets.split import Bad, Split
from pipelines.files import write_table
from pipelines.formats import percent
from pipelines.loader import eval_range

if TYPE_CHECKING:
    from fastimagenet.classifier import Classifier

STDIN = "-"


def parser() -> Parser:
    """Build the parser with all flags of the command."""
    result = make_parser(
        "fastimagenet.predict",
        "Name the likeliest classes of images, with their probabilities.",
        "python -m fastimagenet.predict runs/first holiday/ cat.jpg --top 3 --csv found.csv",
    )
    add = result.add_argument
    cli.add_checkpoint(result)
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help="an image, a folder, whose files and folders are all read, or - for the names on "
        "standard input, one a line",
    )
    add("--top", type=at_least(1), default=TOP, metavar="K", help=f"classes; default {TOP}")
    add("--tta", choices=TTA, default="none", help="average over views of each image")
    form = result.add_mutually_exclusive_group()
    form.add_argument("--csv", type=output_file, metavar="FILE", help="write a table")
    form.add_argument("--json", action="store_true", help="print one JSON object a line and image")
    cli.add_compute_flags(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status, 1 where an image could not be read.

    Raises UserError for the user's mistakes.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    processes = Processes.of(cli.launch_of(args))
    if processes.world_size == 1 or processes.world is not None:
        start_workers(args.backend)
    return processes.run(
        "fastimagenet.predict",
        argv,
        lambda world: work(args, world),
        name=str(args.checkpoint),
    )


def work(args: argparse.Namespace, world: World) -> int:
    """Predict this process's share; the first one reads the names and writes the results."""
    from fastimagenet.classifier import load

    found = given_images(names_of(args.paths)) if world.is_main else None
    split = gather_objects(found, world, "the list of images")[0]
    network = load(args.checkpoint)
    bad: list[Bad] = []
    own = predictions(network, split, world, args, bad)
    shares = gather_objects((own, bad), world, "the predictions")
    bad = [*split.left_out, *(each for _, share in shares for each in share)]
    if world.is_main:
        rows = [row for share, _ in shares for row in share]
        tell(rows, bad, args)
    return 1 if bad else 0


def names_of(paths: Sequence[str]) -> Iterator[str]:
    """Yield the paths, and those on standard input in the place of "-"."""
    for path in paths:
        if path != STDIN:
            yield path
            continue
        for line in sys.stdin.buffer:
            if name := os.fsdecode(line.rstrip(b"\r\n")):
                yield name


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, best first; none where the outputs have a NaN."""

    path: str
    classes: tuple[str, ...]
    p: tuple[float, ...]


def predictions(
    network: Classifier, split: Split, world: World, args: argparse.Namespace, bad: list[Bad]
) -> list[Prediction]:
    """Predict whole batches, a part of them in each process; what cannot be read goes to `bad`.

    A batch holds the same images whatever the number of processes, since the last bits of the
    probabilities depend on it.
    """
    import numpy as np
    import torch

    from fastimagenet.training.evaluation import autocast_dtype, best_classes, scores
    from fastimagenet.training.loaders import open_loader
    from pipelines.backends.lenient import readable_batches

    device, stage = torch.device(world.device), network.stage
    dtype = autocast_dtype(args.precision or network.recipe.precision, device.type)
    alone = replace(world, rank=0, world_size=1)
    model = network.model.to(device).to(memory_format=torch.channels_last)
    batches = eval_range(-(-len(split) // stage.batch_size), world.rank, world.world_size)
    last = min(batches.stop * stage.batch_size, len(split))
    images = readable_batches(
        lambda part: open_loader(
            args.backend,
            network.recipe,
            part,
            (stage,),
            alone,
            training=False,
            half=dtype is not None,
        ),
        split,
        np.arange(batches.start * stage.batch_size, last),
        stage.batch_size,
        bad,
    )
    found, top = [], min(args.top, len(network.classes))
    for logits, mean, indices in scores(model, images, device, dtype, args.tta):
        best = best_classes(logits if mean is None else mean, top)
        p = logits.softmax(dim=1) if mean is None else mean
        found.append((indices, best, p.gather(1, best.clamp(min=0))))
    return [
        Prediction(
            str(split.files[index]),
            tuple(network.classes[label] for label in labels if label >= 0),
            tuple(share for share in shares if not math.isnan(share)),
        )
        for batch in found
        for index, labels, shares in zip(*(part.tolist() for part in batch), strict=True)
    ]


def tell(rows: list[Prediction], bad: list[Bad], args: argparse.Namespace) -> None:
    """Write or print the predictions, and name what could not be read on standard error."""
    for path, reason in bad:
        print(f"left out: {path} {reason}", file=sys.stderr)  # noqa: T201
    if args.csv is not None:
        header, *cells = table(rows)
        write_table(args.csv, header, cells)
        print(f"{len(rows):,} images: {args.csv}")  # noqa: T201
        return
    for row in rows:
        print(json.dumps(vars(row)) if args.json else line(row))  # noqa: T201


def line(row: Prediction) -> str:
    """Format an image for the terminal."""
    pairs = zip(row.classes, row.p, strict=True)
    return f"{row.path}\t" + ", ".join(f"{name} {percent(share)}" for name, share in pairs)


def table(rows: list[Prediction]) -> list[list[str]]:
    """Arrange the cells of path, class1, p1, class2, p2, ..., the header first."""
    width = max((len(row.classes) for row in rows), default=1)
    header = [f"{name}{rank}" for rank in range(1, width + 1) for name in ("class", "p")]
    cells = [["path", *header]]
    for row in rows:
        pairs = zip(row.classes, row.p, strict=True)
        found = [cell for name, share in pairs for cell in (name, f"{share:.6f}")]
        cells.append([row.path, *found, *[""] * (len(header) - len(found))])
    return cells


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
