"""Whether a loader's memory stays flat over epochs and changes of the image size.

    python -m benchmarks.research.loader_memory --data DIR --backend dali --json FILE.json

Reads the training images for some epochs, with as many image sizes one after the other, and looks
at the memory at the end of each epoch, while the next one is read ahead. *Allocated*: the pages of
this process and its workers that are not those of files, each counted once. *Resident*: this
process alone, with the program files that it maps. FILE.json gets the figures, FILE.svg and
FILE.png show them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmarks.common.measuring import begin, command_parser, markdown, training_images
from fastimagenet.report.figures import (
    BLUE,
    ORANGE,
    draw_line,
    mark_phases,
    new_figure,
    thousands,
    with_legend,
    write_files,
)
from pipelines import cli
from pipelines.backends import BACKENDS, make_loader
from pipelines.cli import at_least, output_file
from pipelines.errors import UserError
from pipelines.files import Row, write_object
from pipelines.loader import LoaderSpec, Stage

BAND = 0.05
"""The share within which memory counts as flat."""


def page_sizes(process: int) -> dict[str, float]:
    """Read the MiB of a process by kind of page, see proc(5); Pss divides shared pages by users."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}


def descendants(process: int) -> list[int]:
    """List the ids of the processes that a process has started, and of those that these have."""
    found = []
    for thread in Path(f"/proc/{process}/task").iterdir():
        for child in (thread / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def memory() -> tuple[float, float]:
    """Measure (allocated, resident) in MiB, as in the head of this file."""
    own = page_sizes(os.getpid())
    everyone = [own, *map(page_sizes, descendants(os.getpid()))]
    return sum(pages["Pss_Anon"] + pages["Pss_Shmem"] for pages in everyone), own["Rss"]


def read_epochs(backend: str, spec: LoaderSpec) -> list[Row]:
    """Read all epochs, and print what is found at the end of each, memory in MiB."""
    epochs: list[Row] = []
    with closing(make_loader(backend, spec)) as loader:
        for number in range(1, sum(stage.epochs for stage in spec.stages) + 1):
            start = time.perf_counter()
            for _ in loader:
                pass
            seconds = time.perf_counter() - start
            (allocated, resident), size = memory(), spec.stage_at(number - 1).image_size
            found = {"allocated_mib": allocated, "resident_mib": resident}
            epochs.append({"epoch": number, "image_size": size} | found)
            print(
                f"epoch {number:3}  {size} px  {allocated:7.1f} MiB allocated  "
                f"{resident:7.1f} MiB resident  {seconds:.1f} s",
                flush=True,
            )
    return epochs


def spread(epochs: list[Row], kind: str) -> float:
    """Compute largest / smallest - 1 from the second epoch on."""
    values = [epoch[f"{kind}_mib"] for epoch in epochs[1:]]
    return float(max(values) / min(values) - 1)


def spreads(epochs: list[Row]) -> Row:
    """Compute the spreads over all sizes, and the largest of those at one image size."""
    own: dict[int, list[Row]] = {}
    for epoch in epochs:
        own.setdefault(epoch["image_size"], []).append(epoch)
    return {
        "resident_spread": spread(epochs, "resident"),
        "allocated_spread": spread(epochs, "allocated"),
        "allocated_spread_at_a_size": max(spread(each, "allocated") for each in own.values()),
    }


def table(result: Row) -> str:
    """Format the spreads as Markdown."""
    rows = [("from the second epoch on", "largest / smallest - 1", f"within {BAND:.0%}")]
    for name, key in (
        ("resident size of the process", "resident_spread"),
        ("allocated, workers included", "allocated_spread"),
        ("allocated, at one image size, at most", "allocated_spread_at_a_size"),
    ):
        rows.append((name, f"{result[key]:.1%}", "yes" if result[key] <= BAND else "no"))
    return markdown(rows)


def draw(epochs: list[Row]) -> Figure:
    """Plot memory against epochs; the band is 5 % around the second epoch's resident size."""
    figure, (axes,) = new_figure()
    for key, label, colour in (
        ("resident_mib", "resident size of the process", BLUE),
        ("allocated_mib", "allocated, workers included", ORANGE),
    ):
        points = [(float(epoch["epoch"]), epoch[key]) for epoch in epochs]
        draw_line(axes, points, label=label, color=colour, marker="o", markersize=3)
    middle = epochs[1]["resident_mib"]
    axes.axhspan((1 - BAND) * middle, (1 + BAND) * middle, color=BLUE, alpha=0.12, linewidth=0)
    phases = list({epoch["image_size"]: epoch for epoch in epochs[::-1]}.values())[::-1]
    starts = [phase["epoch"] - 0.5 for phase in phases[1:]]
    mark_phases(axes, phases, [0, *starts], len(epochs))
    axes.set(xlabel="epochs done", ylabel="MiB", ylim=(0, None), xlim=(0, len(epochs) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    return with_legend(figure, ncols=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, data=True)
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="dali")
    sizes = [128, 160, 192, 224]
    help_text = "different ones, for as many epochs each; default 128 160 192 224"
    add("--image-size", type=at_least(1), nargs="+", default=sizes, metavar="S", help=help_text)
    add("--epochs", type=at_least(1), default=20, help="of all sizes together, at least 3 each")
    add("--batch-size", type=at_least(1), default=50)
    add("--threads", type=at_least(1), default=2, help="decoding threads or worker processes")
    help_text = "write the parser, and pictures beside it"
    add("--json", type=output_file, metavar="FILE.json", help=help_text)
    args, about = begin(parser, argv)
    sizes = args.image_size
    if len(set(sizes)) < len(sizes):
        raise UserError("--image-size: name each size once")
    if args.epochs % len(sizes) or args.epochs < 3 * len(sizes):
        raise UserError(
            f"--epochs {args.epochs}: at least 3 for each of {len(sizes)} sizes, evenly"
        )
    each = args.epochs // len(sizes)
    stages = [Stage(epochs=each, image_size=size, batch_size=args.batch_size) for size in sizes]
    spec = LoaderSpec(
        split=training_images(args.data),
        stages=tuple(stages),
        training=True,
        num_threads=args.threads,
    )
    epochs = read_epochs(args.backend, spec)
    names = ("backend", "image_size", "epochs", "batch_size", "threads")
    config = {"data": str(args.data)} | {name: getattr(args, name) for name in names}
    result = about | {"config": config, "epochs": epochs} | spreads(epochs)
    print(f"\n{table(result)}")
    if args.json is not None:
        write_object(args.json, result)
        write_files(draw(epochs), args.json.parent, args.json.stem)
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
