"""How fast our loaders are, against what a user would pick instead and against mere decoding.

    python -m benchmarks.loaders --data DIR --image-size 224 --threads 2
    python -m benchmarks.loaders --data originals=DIR copies=SMALL/160 --image-size 128 224

All read training images, endlessly and in random order, and cut random crops of a quarter to the
whole of the area (with --reflect-pad: of the whole image, padded), flipped half of the time,
normalised to float32 on the CPU. `decode` only decodes whole images and `decode-crops` only crops,
from memory: the ceilings. All of one image size take turns, on all folders: in each round every
loader makes a few batches that are not counted, then batches for some seconds. The intervals are
over the rounds. What our back end `memory` spends on reading the set once is not counted. Left out
are loaders that cannot take part: `memory` where the set does not fit, `spdl` where it is missing,
`decode` where there are no JPEGs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measuring import begin, command_parser, markdown, training_images
from benchmarks.common.rates import calls_per_sec
from benchmarks.common.statistics import estimates, ratio, ratios, shown
from benchmarks.loaders.contestants import LOADERS, MIN_SCALE, Task, spdl_version
from pipelines import cli
from pipelines.cli import at_least
from pipelines.datasets.digits import digits_folder
from pipelines.errors import UserError
from pipelines.files import Row, write_object

PAUSE_SECONDS = 0.5
"""Before each turn, while the one before fills its queues."""

Rounds = dict[str, list[float]]
"""Images per second of each round, by loader."""


def images_per_sec(batches: Iterator[Any], task: Task, seconds: float) -> float:
    """Measure the rate over at least `seconds`, after batches that are not counted."""
    time.sleep(PAUSE_SECONDS)
    # A DataLoader makes two a worker ahead, the others fewer: none is measured on its stock.
    ahead = 2 * task.threads + 2
    rate = calls_per_sec(lambda: next(batches), torch.device("cpu"), seconds, ahead)
    return rate * task.batch_size


def measure(
    tasks: dict[str, Task], args: argparse.Namespace, left_out: dict[str, str]
) -> dict[str, Rounds]:
    """Measure every folder's rounds; loaders that cannot take part go to `left_out`."""
    found: dict[str, Rounds] = {label: {} for label in tasks}
    with ExitStack() as stack:
        running = []
        for label, task in tasks.items():
            for name in args.only:
                try:  # files into the page cache, buffers to their size
                    batches = stack.enter_context(closing(LOADERS[name](task)))
                    images_per_sec(batches, task, 0.1)
                except UserError as error:
                    left_out[name] = str(error)
                    print(f"{name} is left out: {error}", flush=True)
                    continue
                running.append((label, name, batches))
                found[label][name] = []
        if not running:
            raise UserError(f"--only {' '.join(args.only)}: none can take part: name others")
        for number in range(1, args.rounds + 1):
            for label, name, batches in running:
                rate = images_per_sec(batches, tasks[label], args.seconds)
                found[label][name].append(rate)
                print(f"round {number}  {label}  {name:13} {rate:8.1f} images/s", flush=True)
    return found


def run(args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Measure all folders at all sizes; returns the rows, and who is left out and why.

    Raises UserError naming the flag or folder.
    """
    folders = labelled(args.data)
    splits = {label: training_images(folder) for label, folder in folders.items()}
    measured: list[Row] = []
    left_out: dict[str, str] = {}
    for image_size in args.image_size:
        shape = {"image_size": image_size, "batch_size": args.batch_size}
        shape |= {"threads": args.threads, "reflect_pad": args.reflect_pad}
        tasks = {label: Task(split=split, **shape) for label, split in splits.items()}
        first: Rounds = {}
        for label, rounds in measure(tasks, args, left_out).items():
            data = str(folders[label]) if args.data else "embedded digits"
            about = {"label": label, "data": data, "images": len(splits[label])}
            measured.append(about | {"image_size": image_size} | compare(rounds, first))
            first = first or rounds
    return measured, left_out


def compare(rounds: Rounds, first: Rounds) -> Row:
    """Compute means and ratios of one folder; `first` are the rounds of the first folder."""
    shared = [name for name in rounds if name in first]
    return {
        "images_per_sec": estimates(rounds),
        "ratio_to_dataloader": ratios(rounds, "dataloader"),
        "ratio_to_decode": ratios(rounds, "decode"),
        "ratio_to_first": {name: asdict(ratio(rounds[name], first[name])) for name in shared},
        "rounds": rounds,
    }


def table(measured: Sequence[Row]) -> str:
    """Format as Markdown: a line per image size, folder and loader; means with 95 % intervals."""
    bases = {"dataloader": "dataloader", "decode": "decode"}
    if any(one["ratio_to_first"] for one in measured):
        bases["first"] = measured[0]["label"]
    rows = [["image size", "data", "loader", "images/s", *(f"/ {b}" for b in bases.values())]]
    for one in measured:
        for name, rate in one["images_per_sec"].items():
            found = [one[f"ratio_to_{base}"].get(name) for base in bases]
            cells = [shown(ratio) if ratio else "-" for ratio in found]
            rows.append([f"{one['image_size']} px", one["label"], name, shown(rate), *cells])
    return markdown(rows)


def labelled(data: list[str] | None) -> dict[str, Path]:
    """Return the folders by label: LABEL=DIR, or the folder's own name."""
    if data is None:
        return {"digits": digits_folder()}
    folders: dict[str, Path] = {}
    for text in data:
        label, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            label, folder = Path(text).resolve().name, text
        if label in folders:
            raise UserError(f"--data: two folders are called {label}: write LABEL={folder}")
        folders[label] = Path(folder)
    return folders


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, turn_seconds=8, json=True)
    add = parser.add_argument
    help_text = "folders with train/CLASS/IMAGE that are read in turn; default: the embedded digits"
    add("--data", nargs="+", metavar="[LABEL=]DIR", help=help_text)
    add("--image-size", type=at_least(1), nargs="+", default=[224], metavar="S", help="default 224")
    help_text = f"some of {', '.join(LOADERS)}"
    only = list(LOADERS)
    add("--only", nargs="+", choices=only, default=only, metavar="NAME", help=help_text)
    add("--reflect-pad", type=at_least(0), default=0, help="in place of random areas: pad, crop")
    add("--threads", type=at_least(1), default=2, help="decoding threads or worker processes")
    add("--batch-size", type=at_least(1), default=64)
    args, about = begin(parser, argv)
    torch.set_num_threads(args.threads)  # for what is augmented in this process
    measured, left_out = run(args)
    print(f"\n{about['hardware']}, {args.threads} threads (95 % intervals)\n")
    print(table(measured))
    if args.json is not None:
        names = ("threads", "batch_size", "reflect_pad", "seconds")
        config = {name: getattr(args, name) for name in names} | {"min_scale": MIN_SCALE}
        result = about | {"config": config, "measured": measured, "left_out": left_out}
        result["versions"] |= spdl_version()
        write_object(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
