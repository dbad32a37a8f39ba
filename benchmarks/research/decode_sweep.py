"""How fast DALI decodes full-size photographs on this device, and with which settings.

    python -m benchmarks.research.decode_sweep --data DIR --json FILE

The training transform, mixed decoding on a GPU, from files that the page cache holds: the training
images of DIR, named again and again up to --entries. First the default settings at every size; then
at one size the shares of the hardware decoder with all numbers of threads, prefetch depths and
preallocation with the best of them; at last the best settings at the other sizes. What has been
measured is not measured again. FILE is written after each measurement; one that fails is in it with
its error, and the others follow.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from benchmarks.common.measuring import command_parser, markdown, training_images
from benchmarks.common.rates import WARM_UP_BATCHES, calls_per_sec, endless
from benchmarks.common.statistics import Estimate, estimate
from benchmarks.common.tables import DECODE_HEADER, Table, decode_row
from fastimagenet import cli
from pipelines.backends import make_loader
from pipelines.cli import at_least, positive
from pipelines.datasets.split import Split
from pipelines.files import Row, write_object
from pipelines.loader import DaliSettings, LoaderSpec, Stage
from pipelines.workers import num_cores

ROUNDS = 3
SWEPT_SIZE = 224
"""Where it is among the sizes, else the last of them."""
HW_DECODER_LOADS = (0.0, 0.5, 0.65, 0.75, 0.99)
PREFETCHES = (1, 3, 5)


@dataclass(frozen=True, kw_only=True)
class DecodeRate:
    """One measurement."""

    image_size: int
    batch_size: int
    threads: int
    settings: DaliSettings
    images_per_sec: Estimate | None
    """None where it failed."""
    error: str = ""

    @property
    def mean(self) -> float:
        """0 where it failed."""
        return 0.0 if self.images_per_sec is None else self.images_per_sec.mean


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured on what."""

    split: Split
    device: torch.device
    batch_size: int
    seconds: float
    """Of each measurement."""

    def measure(self, image_size: int, threads: int, settings: DaliSettings) -> DecodeRate:
        """Measure the rate over ROUNDS turns of one loader, whose start is not counted."""
        on_gpu = self.device.type == "cuda"
        stage = Stage(epochs=1, image_size=image_size, batch_size=self.batch_size)
        spec = LoaderSpec(
            split=self.split,
            stages=(stage,),
            training=True,
            device=str(self.device),
            half=on_gpu,
            num_threads=threads,
            dali=settings,
        )
        found, error = None, ""
        try:
            with closing(make_loader("dali", spec)) as loader:
                batches = endless(loader)
                rates = [
                    calls_per_sec(
                        lambda: next(batches),
                        self.device,
                        self.seconds / ROUNDS,
                        # More than any depth: the buffers have their size, the stock is used up.
                        0 if turn else WARM_UP_BATCHES + settings.prefetch,
                    )
                    for turn in range(ROUNDS)
                ]
            found = estimate([rate * self.batch_size for rate in rates])
        except Exception as reason:  # one setting must not end the sweep
            traceback.print_exc()
            # What DALI says begins with the lines that have defined the operator.
            text = " ".join(str(reason).partition("encountered:")[2].split() or str(reason).split())
            error = f"{type(reason).__name__}: {text[:300]}"
        return DecodeRate(
            image_size=image_size,
            batch_size=self.batch_size,
            threads=threads,
            settings=settings,
            images_per_sec=found,
            error=error,
        )

    def sweep(self, sizes: Sequence[int], threads: Sequence[int]) -> Iterator[DecodeRate]:
        """Yield all measurements, in the order of their importance."""
        default, at = DaliSettings(), SWEPT_SIZE if SWEPT_SIZE in sizes else sizes[-1]
        known: dict[tuple[int, int, DaliSettings], DecodeRate] = {}

        def new(size: int, count: int, settings: DaliSettings) -> Iterator[DecodeRate]:
            if (size, count, settings) not in known:
                known[size, count, settings] = self.measure(size, count, settings)
                yield known[size, count, settings]

        def fastest() -> DecodeRate:
            return max((r for r in known.values() if r.image_size == at), key=lambda r: r.mean)

        for size in sizes:
            yield from new(size, max(threads), default)
        on_gpu = self.device.type == "cuda"
        loads = HW_DECODER_LOADS if on_gpu else (default.hw_decoder_load,)
        for load in loads[::-1]:
            for count in sorted(threads, reverse=True):
                yield from new(at, count, replace(default, hw_decoder_load=load))
        best = fastest()
        for depth in PREFETCHES:
            yield from new(at, best.threads, replace(best.settings, prefetch=depth))
        best = fastest()
        if on_gpu and self.split.shapes is not None:
            # Of all but the largest hundredth: a few are many times as large as the others.
            high, wide = np.quantile(self.split.shapes, 0.99, 0, method="lower").tolist()
            settings = replace(best.settings, width_hint=wide, height_hint=high)
            yield from new(at, best.threads, settings)
            best = fastest()
        for size in sizes:
            yield from new(size, best.threads, best.settings)


def repeated(split: Split, entries: int) -> Split:
    """Repeat the images of the split until there are so many."""
    return split.take(np.resize(np.arange(len(split)), max(len(split), entries)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 1 where a measurement failed. Raises UserError."""
    start = time.monotonic()
    parser = command_parser(__doc__, data=True, json=True)
    cli.add_device_flag(parser)
    add = parser.add_argument
    add("--entries", type=at_least(1), default=20_000, metavar="N", help="at least; default 20000")
    sizes = [128, 160, 192, 224, 288]
    add("--image-size", type=at_least(1), nargs="+", default=sizes, metavar="S")
    help_text = "default 4, 8, 16, up to the cores"
    add("--threads", type=at_least(1), nargs="+", metavar="T", help=help_text)
    add("--batch-size", type=at_least(1), default=256)
    add("--seconds", type=positive, default=1.2, help="of each measurement, default 1.2")
    add("--limit", type=float, default=600.0, metavar="SECONDS", help="none is begun after this")
    args = parser.parse_args(argv)
    cores = num_cores()
    threads = args.threads or [count for count in (4, 8, 16) if count <= cores] or [cores]
    originals = training_images(args.data)
    task = Task(
        split=repeated(originals, args.entries),
        device=cli.one_device(args.device),
        batch_size=args.batch_size,
        seconds=args.seconds,
    )
    decoder = "mixed" if task.device.type == "cuda" else "cpu"
    rates: list[Row] = []
    rows: Table = [DECODE_HEADER]
    print(", ".join(DECODE_HEADER))
    for rate in task.sweep(args.image_size, threads):
        rates.append(asdict(rate))
        rows.append(decode_row(rates[-1], decoder))
        print(", ".join(rows[-1]), flush=True)
        over = time.monotonic() - start > args.limit
        if args.json is not None:
            result: Row = {"device": task.device.type, "decoder": decoder}
            result |= {"photographs": len(originals), "entries": len(task.split)}
            result |= {"seconds": args.seconds, "rounds": ROUNDS, "cut_by_limit": over}
            write_object(args.json, result | {"rates": rates})
        if over:
            break
    print(f"\n{markdown(rows)}")
    failed = [rate["error"] for rate in rates if rate["error"]]
    if failed:
        told = f"{len(failed)} of {len(rates)} failed; the first: {failed[0]}"
        print(f"error: {told}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
