"""How fast `prepare scan --decode` and `prepare resize` are, against Pillow's mere decoding.

    python -m benchmarks.prepare_rates --data DIR --workers 2

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
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import prepare_jobs
from benchmarks.intervals import Estimate, estimate, ratio
from benchmarks.prepare_jobs import Part
from benchmarks.run_table import markdown
from pipelines import cli
from pipelines.cli import Parser, at_least, make_parser, output_file, positive
from pipelines.environment import processor, versions
from pipelines.errors import UserError
from pipelines.files import write_object
from pipelines.prepare.scan import PIXELS, list_folder
from pipelines.workers import in_processes, num_cores


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured, on what, and when."""

    config: dict[str, Any]
    images_per_sec: dict[str, Estimate]
    """Of "decode", "scan" and "resize", over the rounds."""
    ratio_to_decode: dict[str, Estimate]
    """Geometric mean over the rounds."""
    rounds: dict[str, list[float]]
    """Images per second of each round."""
    versions: dict[str, str]
    hardware: str
    load_average: float
    """Of the machine at the start, over the minute before: well above 0, others ran too."""
    date: str


def parts(names: list[str]) -> Iterator[Part]:
    """All files in parts, without end."""
    for again in count():
        for start in range(0, len(names), PIXELS):
            yield again, names[start : start + PIXELS]


def images_per_sec(
    job: Callable[[Part], int], names: list[str], workers: int, seconds: float
) -> float:
    """The rate over at least `seconds`, from the first result on."""
    with closing(in_processes(job, parts(names), workers)) as results:
        next(results)
        images = 0
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            images += next(results)
    return images / elapsed


def measure(args: argparse.Namespace) -> Result:
    """Measure all in turn. Raises UserError naming the flag."""
    load_average = os.getloadavg()[0]
    root = Path(os.path.abspath(args.data))
    names = list_folder(root).names
    if not names:
        raise UserError(f"--data: {root} has no images")
    rounds: dict[str, list[float]] = {"decode": [], "scan": [], "resize": []}
    for number in range(1, args.rounds + 1):
        with TemporaryDirectory(prefix="prepare-rates-") as folder:
            output = Path(folder)
            (output / "scratch").mkdir()
            jobs: dict[str, Callable[[Part], int]] = {
                "decode": partial(prepare_jobs.decode, root),
                "scan": partial(prepare_jobs.scan, root),
                "resize": partial(prepare_jobs.resize, root, output, tuple(args.short_side)),
            }
            for name, job in jobs.items():
                rate = images_per_sec(job, names, args.workers, args.seconds)
                rounds[name].append(rate)
                print(f"round {number}  {name:6} {rate:8.1f} images/s", flush=True)
    base = rounds["decode"]
    return Result(
        config={
            "data": str(args.data),
            "images": len(names),
            "workers": args.workers,
            "short_side": args.short_side,
            "seconds": args.seconds,
        },
        images_per_sec={name: estimate(rates) for name, rates in rounds.items()},
        ratio_to_decode={n: ratio(rates, base) for n, rates in rounds.items() if n != "decode"},
        rounds=rounds,
        versions=versions(),
        hardware=processor(),
        load_average=load_average,
        date=date.today().isoformat(),
    )


def parser() -> Parser:
    """All flags of the command."""
    result = make_parser(
        "benchmarks.prepare_rates",
        __doc__.partition("\n")[0],
        "python -m benchmarks.prepare_rates --data photos --workers 2",
    )
    add = result.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="image folder without bad files")
    add(
        "--workers", type=at_least(1), default=num_cores(), metavar="K", help="default: a core each"
    )
    help_text = "of the copies; default 160"
    add("--short-side", type=at_least(8), nargs="+", default=[160], metavar="S", help=help_text)
    add("--rounds", type=at_least(2), default=5, help="at least 2, for the intervals")
    add("--seconds", type=positive, default=8, help="of each in each round")
    add("--json", type=output_file, metavar="FILE", help="write the result here as well")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    args = parser().parse_args(argv)
    result = measure(args)
    rows = [["", "images/s", "/ decode"]]
    for name, rate in result.images_per_sec.items():
        rows.append([name, str(rate), str(result.ratio_to_decode.get(name, "-"))])
    print(f"\n{result.hardware}, {args.workers} processes (95 % intervals)\n\n{markdown(rows)}")
    if args.json is not None:
        write_object(args.json, asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
