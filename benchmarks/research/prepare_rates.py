"""How fast `prepare scan --decode` and `prepare resize` are, against Pillow's mere decoding.

    python -m benchmarks.research.prepare_rates --data DIR --workers 2

All read the same files, over and over, in as many processes, and take turns: in each round each of
them works for some seconds from its first result on, so that the start of the processes does not
count. The intervals are over the rounds. The copies go to a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from benchmarks.common.measuring import begin, command_parser, markdown
from benchmarks.common.statistics import estimates, ratios, shown
from pipelines import cli
from pipelines.cli import at_least
from pipelines.errors import UserError
from pipelines.files import write_object
from pipelines.prepare.examine import examine_all
from pipelines.prepare.resize import Resizer
from pipelines.prepare.scan import PIXELS, list_folder
from pipelines.workers import in_processes, num_cores

QUALITY = 90
"""What `prepare resize` takes by default."""

Part = tuple[int, list[str]]
"""How often all files were read before, and the names of some, relative to the folder."""


def decode(root: Path, part: Part) -> int:
    """Decode by Pillow alone; returns the number of images, as the other jobs do."""
    for name in part[1]:
        try:
            with Image.open(root / name) as image:
                image.load()
        except Exception as error:
            raise UserError(f"--data: {root / name} cannot be decoded: {error}") from None
    return len(part[1])


def scan(root: Path, part: Part) -> int:
    """Do what `prepare scan --decode` does, as if it had not seen the files before."""
    return len(examine_all(root, True, part[1]))


def resize(root: Path, output: Path, short_sides: tuple[int, ...], part: Part) -> int:
    """Do what `prepare resize` does, each time to another folder of `output`."""
    scratch = output / "scratch"
    resizer = Resizer(root, output / str(part[0]), short_sides, QUALITY)
    return len(resizer.copy_images(scratch, part[1]))


def parts(names: list[str]) -> Iterator[Part]:
    """Yield all files in parts, without end."""
    for again in count():
        for start in range(0, len(names), PIXELS):
            yield again, names[start : start + PIXELS]


def images_per_sec(
    job: Callable[[Part], int], names: list[str], workers: int, seconds: float
) -> float:
    """Measure the rate over at least `seconds`, from the first result on."""
    with closing(in_processes(job, parts(names), workers)) as results:
        next(results)
        images = 0
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            images += next(results)
    return images / elapsed


def measure(root: Path, names: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Measure the images per second of every job, round by round."""
    rounds: dict[str, list[float]] = {"decode": [], "scan": [], "resize": []}
    for number in range(1, args.rounds + 1):
        with TemporaryDirectory(prefix="prepare-rates-") as folder:
            output = Path(folder)
            (output / "scratch").mkdir()
            jobs: dict[str, Callable[[Part], int]] = {
                "decode": partial(decode, root),
                "scan": partial(scan, root),
                "resize": partial(resize, root, output, tuple(args.short_side)),
            }
            for name, job in jobs.items():
                rate = images_per_sec(job, names, args.workers, args.seconds)
                rounds[name].append(rate)
                print(f"round {number}  {name:6} {rate:8.1f} images/s", flush=True)
    return rounds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, data=True, turn_seconds=8, json=True)
    add = parser.add_argument
    cores = num_cores()
    add("--workers", type=at_least(1), default=cores, metavar="K", help="default: a core each")
    help_text = "of the copies; default 160"
    add("--short-side", type=at_least(8), nargs="+", default=[160], metavar="S", help=help_text)
    args, about = begin(parser, argv)
    root = Path(os.path.abspath(args.data))
    names = list_folder(root).names
    if not names:
        raise UserError(f"--data: {root} has no images")
    rounds = measure(root, names, args)
    rates, shares = estimates(rounds), ratios(rounds, "decode")
    rows = [["", "images/s", "/ decode"]]
    for name, rate in rates.items():
        rows.append([name, shown(rate), shown(shares[name]) if name in shares else "-"])
    print(f"\n{about['hardware']}, {args.workers} processes (95 % intervals)\n\n{markdown(rows)}")
    if args.json is not None:
        config = {name: getattr(args, name) for name in ("workers", "short_side", "seconds")}
        config |= {"data": str(args.data), "images": len(names)}
        result = {"config": config, "images_per_sec": rates, "ratio_to_decode": shares}
        write_object(args.json, about | result | {"rounds": rounds})
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
