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
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_ceiling import decode, decode_crops
from benchmarks.loader_results import Measured, Result, Rounds, compare, table
from benchmarks.loader_rivals import MIN_SCALE, Task, dataloader, dataloader_v2, spdl, spdl_version
from benchmarks.training_images import training_images
from pipelines import cli
from pipelines.backends import make_loader
from pipelines.cli import at_least, make_parser, output_file, positive
from pipelines.datasets.digits import digits_folder
from pipelines.datasets.split import Split
from pipelines.environment import processor, versions
from pipelines.errors import UserError
from pipelines.files import write_object
from pipelines.loader import LoaderSpec, Stage


def ours(backend: str, task: Task) -> Generator[Any]:
    """One of our back ends, epoch after epoch. Raises UserError where it cannot be had."""
    stage = Stage(
        epochs=1, image_size=task.image_size, batch_size=task.batch_size, min_scale=MIN_SCALE
    )
    spec = LoaderSpec(
        split=task.split,
        stages=(stage,),
        training=True,
        num_threads=task.threads,
        reflect_pad=task.reflect_pad,
    )
    with closing(make_loader(backend, spec)) as loader:
        while True:
            yield from loader


LOADERS: dict[str, Callable[[Task], Generator[Any]]] = {
    "dataloader": dataloader,
    "dataloader-v2": dataloader_v2,
    "spdl": spdl,
    "torchvision": partial(ours, "torchvision"),
    "dali": partial(ours, "dali"),
    "memory": partial(ours, "memory"),
    "decode": decode,
    "decode-crops": decode_crops,
}
PAUSE_SECONDS = 0.5
"""Before each turn, while the one before fills its queues."""


def images_per_sec(batches: Iterator[Any], task: Task, seconds: float) -> float:
    """The rate over at least `seconds`, after batches that are not counted."""
    time.sleep(PAUSE_SECONDS)
    # A DataLoader makes two a worker ahead, the others fewer: none is measured on its stock.
    for _ in range(2 * task.threads + 2):
        next(batches)
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    return count * task.batch_size / elapsed


def measure(
    tasks: dict[str, Task], args: argparse.Namespace, left_out: dict[str, str]
) -> dict[str, Rounds]:
    """The rounds of every folder; loaders that cannot take part go to `left_out`."""
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


def run(args: argparse.Namespace) -> Result:
    """Measure all loaders in turn. Raises UserError naming the flag or folder."""
    load_average = os.getloadavg()[0]
    folders = labelled(args.data)
    splits = {label: training_images(folder) for label, folder in folders.items()}
    measured: list[Measured] = []
    left_out: dict[str, str] = {}
    for image_size in args.image_size:
        tasks = {label: make_task(split, image_size, args) for label, split in splits.items()}
        rounds = measure(tasks, args, left_out)
        first = None
        for label, own in rounds.items():
            measured.append(
                compare(
                    own,
                    first,
                    label=label,
                    data=str(folders[label]) if args.data else "embedded digits",
                    images=len(splits[label]),
                    image_size=image_size,
                )
            )
            first = first or own
    return Result(
        config={
            "threads": args.threads,
            "batch_size": args.batch_size,
            "min_scale": MIN_SCALE,
            "reflect_pad": args.reflect_pad,
            "seconds": args.seconds,
        },
        measured=measured,
        left_out=left_out,
        versions=versions() | spdl_version(),
        hardware=processor(),
        load_average=load_average,
        date=date.today().isoformat(),
    )


def labelled(data: list[str] | None) -> dict[str, Path]:
    """Folders by label: LABEL=DIR, or the folder's own name."""
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


def make_task(split: Split, image_size: int, args: argparse.Namespace) -> Task:
    return Task(
        split=split,
        image_size=image_size,
        batch_size=args.batch_size,
        threads=args.threads,
        reflect_pad=args.reflect_pad,
    )


def parser() -> argparse.ArgumentParser:
    result = make_parser(
        "benchmarks.loaders",
        __doc__.partition("\n")[0],
        "python -m benchmarks.loaders --data originals=imagenet copies=small/160 --threads 2",
    )
    add = result.add_argument
    add(
        "--data",
        nargs="+",
        metavar="[LABEL=]DIR",
        help="folders with train/CLASS/IMAGE that are read in turn (default: the embedded digits)",
    )
    add("--image-size", type=at_least(1), nargs="+", default=[224], metavar="S", help="default 224")
    add("--only", nargs="+", choices=LOADERS, default=list(LOADERS), metavar="NAME",
        help=f"some of {', '.join(LOADERS)}")  # fmt: skip
    add("--reflect-pad", type=at_least(0), default=0, help="in place of random areas: pad, crop")
    add("--threads", type=at_least(1), default=2, help="decoding threads or worker processes")
    add("--batch-size", type=at_least(1), default=64)
    add("--rounds", type=at_least(2), default=5, help="at least 2, for the intervals")
    add("--seconds", type=positive, default=8, help="per loader and round")
    add("--json", type=output_file, help="write the result here as well")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)  # for what is augmented in this process
    result = run(args)
    print(f"\n{result.hardware}, {args.threads} threads (95 % intervals)\n")
    print(table(result.measured))
    if args.json is not None:
        write_object(args.json, asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
