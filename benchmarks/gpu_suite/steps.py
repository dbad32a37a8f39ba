"""The suite's sweep of the ResNet-50 training step: `benchmarks.training_step` within a time limit.

    python -m benchmarks.gpu_suite.steps --limit 150 --json steps.json

The first size in every variant, then the others: eager, the batch doubled for as long as that pays;
then, size by size, compiled and with CUDA graphs at the best of these batches, as compiling takes
most of the time. The file is written after each measurement. A CUDA error leaves a process
unusable: another one takes its place and resumes after what the file has.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.measuring import command_parser
from benchmarks.training_step import StepRate, sweep
from fastimagenet import cli
from pipelines.cli import at_least, output_file, positive
from pipelines.files import Row, read_object, write_object

PAYS = 1.02
"""A batch of twice the images that gives this many times the rate is worth trying on from."""
BROKEN = ("CUDA error", "AcceleratorError", "cudaError")
"""Words of errors after which nothing works on the GPU in that process."""


class StepSweep:
    """What was measured so far, kept in a file."""

    def __init__(self, path: Path, device: str, seconds: float, deadline: float) -> None:
        self.path, self.device, self.seconds, self.deadline = path, device, seconds, deadline
        self.rates: list[Row] = read_object(path)["rates"] if path.exists() else []

    def report(self, rate: StepRate) -> None:
        """Keep and print a measurement; after a CUDA error, begin anew."""
        self.rates.append(asdict(rate))
        self.write(cut=True)
        print(rate, flush=True)
        if any(word in rate.error for word in BROKEN):
            sys.stderr.flush()
            again = [sys.executable, "-m", "benchmarks.gpu_suite.steps", *sys.argv[1:]]
            os.execv(sys.executable, again)

    def write(self, cut: bool) -> None:
        """Write the file; `cut`: there would be more to measure."""
        write_object(self.path, {"cut_by_limit": cut, "rates": self.rates})

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def of(self, size: int, variant: str) -> list[Row]:
        """Return the measurements at a size in a variant."""
        wanted = size, variant
        return [rate for rate in self.rates if (rate["image_size"], rate["variant"]) == wanted]

    def measure(self, size: int, variant: str, batches: Sequence[int]) -> None:
        """Measure the batches that are not there already."""
        done = {rate["batch_size"] for rate in self.of(size, variant)}
        left = [batch for batch in batches if batch not in done]
        if left:
            sweep([size], [variant], left, device=self.device, seconds=self.seconds,
                  report=self.report)  # fmt: skip

    def eager(self, size: int, batches: Sequence[int]) -> None:
        """Measure the batches, and doubled ones while that pays and memory lasts."""
        while batches and not self.over:
            if not any(map(out_of_memory, self.of(size, "eager"))):
                self.measure(size, "eager", batches)
            ran = [rate for rate in self.of(size, "eager") if not rate["error"]]
            ran.sort(key=lambda rate: rate["batch_size"])
            means = [rate["images_per_sec"]["mean"] for rate in ran[-2:]]
            pays = len(ran) == len(self.of(size, "eager")) > 1 and means[1] > PAYS * means[0]
            batches = [2 * ran[-1]["batch_size"]] if pays else []

    def at_best_batch(self, size: int, variant: str) -> None:
        """Measure at the batch of the fastest eager step, halved where memory does not last."""
        ran = [rate for rate in self.of(size, "eager") if not rate["error"]]
        best = max(ran, key=lambda rate: rate["images_per_sec"]["mean"], default=None)
        batch = 0 if best is None else best["batch_size"]
        while batch and not self.over:
            self.measure(size, variant, [batch])
            gone = [rate["batch_size"] for rate in self.of(size, variant) if out_of_memory(rate)]
            batch = batch // 2 if batch in gone else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; returns the exit status, 1 where a measurement failed."""
    start = time.monotonic()
    parser = command_parser(__doc__)
    cli.add_device_flag(parser)
    add = parser.add_argument
    sizes = [224, 128, 160, 192, 288]
    add("--image-size", type=at_least(8), nargs="+", default=sizes, metavar="S")
    add("--batch-size", type=at_least(1), nargs="+", default=[128, 256, 512], metavar="B")
    add("--variants", nargs="*", default=["compiled", "graphs"], metavar="V", help="beside eager")
    add("--seconds", type=positive, default=1.0, help="of each measurement, default 1")
    add("--limit", type=float, default=600.0, metavar="SECONDS", help="none is begun after this")
    help_text = "resumed where it exists"
    add("--json", type=output_file, required=True, metavar="FILE", help=help_text)
    args = parser.parse_args(argv)
    if args.json.exists():  # a second process: the limit is that of the first
        start -= time.time() - args.json.with_suffix(".start").stat().st_mtime
    else:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.with_suffix(".start").touch()
    device = str(cli.one_device(args.device))
    found = StepSweep(args.json, device, args.seconds, start + args.limit)
    for sizes in (args.image_size[:1], args.image_size[1:]):
        for size in sizes:
            found.eager(size, args.batch_size)
        for size in sizes:
            for variant in args.variants:
                found.at_best_batch(size, variant)
    found.write(cut=found.over)
    failed = [rate for rate in found.rates if rate["error"] and not out_of_memory(rate)]
    for rate in failed:
        name = f"{rate['variant']} at {rate['image_size']} px, batch {rate['batch_size']}"
        print(f"error: {name}: {rate['error']}", file=sys.stderr)
    return 1 if failed or not found.rates else 0


def out_of_memory(rate: Row) -> bool:
    """Return whether the batch was too large: the end of a sweep, no failure."""
    return "out of memory" in rate["error"]


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
