"""What an image costs a training by image size, batch size and number of images, and the limits.

    python -m benchmarks.research.growth --data DIR --recipe photos-scratch --sizes 64 96 128 160

In each round all sizes take turns, then in others all batch sizes, and all numbers of images, both
at the smallest size, where what does not grow with the pixels shows most. The limits are measured
in every round. A data set of N images costs whole epochs, with their start, and the reading of a
folder of N links; above the number of images some have several names. One process on one device,
files that the operating system has in its cache, no copies of the data.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.common.measuring import begin, command_parser, document, markdown, write_result
from benchmarks.common.rates import (
    calls_per_sec,
    endless,
    matmul_flops_per_sec,
    phase_trainer,
    processes_of,
    run_config,
    step_costs,
    synthetic_batch,
    this_process,
    update,
    warm_up_batches,
)
from benchmarks.common.statistics import estimate, shown
from benchmarks.loaders.contestants import Task, decode, decode_crops
from fastimagenet import cli
from fastimagenet.config import RunConfig
from fastimagenet.distributed.world import World
from fastimagenet.images import read_data
from fastimagenet.report import figures
from fastimagenet.training.evaluation import autocast_dtype
from fastimagenet.training.trainer import Trainer
from pipelines.backends import chosen_backend
from pipelines.cli import at_least, output_folder
from pipelines.datasets.index import load, make_index, save
from pipelines.datasets.known import ORIGINAL
from pipelines.datasets.source import find_source
from pipelines.datasets.split import BY_FOLDERS, Split
from pipelines.errors import UserError
from pipelines.files import Row
from pipelines.workers import num_cores

DEFINITIONS = {
    "loader": "alone: reading, decoding, augmentation.",
    "network": "alone: forward, backward and update, on a synthetic batch.",
    "training": "both together; on a CPU they share the cores.",
    "index, index again": "listing a folder and reading its headers, and with the index of that.",
    "limit: decode": "the JPEGs decoded and nothing else, on as many threads of the CPU.",
    "limit: product": "matrix products and convolutions of the network, as counted, at the rate of "
    "a large matrix product; a convolution by an algorithm of fewer operations can pass it.",
    "power": "the k of a x^k, fitted to these points alone: it says nothing of what lies beyond.",
    "off": "the largest distance of a mean from that fit; where it is large, there is no power.",
}
LOOKS: dict[str, dict[str, Any]] = {
    "loader": {"color": figures.BLUE, "marker": "o"},
    "network": {"color": figures.ORANGE, "marker": "s"},
    "training": {"color": figures.BLACK, "marker": "D"},
    "index": {"color": figures.PURPLE, "marker": "^"},
    "index again": {"color": figures.SKY, "marker": "v"},
    "limit: decode": {"color": figures.GREEN, "linestyle": (0, (5, 2))},
    "limit: product": {"color": figures.VERMILLION, "linestyle": (0, (1.2, 1.2))},
}
Costs = dict[str, float]
"""Seconds of this machine for an image, by part."""


class Limits:
    """What no training can be faster than: mere decoding of these files, and a matrix product."""

    def __init__(self, config: RunConfig, world: World, train: Split, batch_size: int) -> None:
        kind = world.device.partition(":")[0]
        self.device, self.batch_size = torch.device(world.device), batch_size
        self.dtype = autocast_dtype(config.recipe.precision, kind) or torch.float32
        self.threads = max(1, num_cores() // world.local_world_size)
        crops = chosen_backend(config.data.backend) == "dali" and not config.recipe.reflect_pad
        self.decoder = "DALI, windows of 25 to 100 %" if crops else "Pillow, whole images"
        self.ahead = warm_up_batches(0 if crops else self.threads)  # Pillow's are processes
        task = Task(split=train, image_size=0, batch_size=batch_size, threads=self.threads)
        self.batches = (decode_crops if crops else decode)(task)
        try:
            next(self.batches)
        except UserError as error:
            raise UserError(f"--data {config.data.root}: {error}") from None

    def turn(self, seconds: float) -> tuple[float, float]:
        """Measure seconds an image of decoding, and seconds a FLOP of a product."""
        rate = calls_per_sec(lambda: next(self.batches), self.device, seconds, self.ahead)
        product = matmul_flops_per_sec(self.device, self.dtype, seconds)
        return 1 / rate / self.batch_size, 1 / product


class Case:
    """A trainer that takes its turns; `folder`: links to its images, whole epochs are measured."""

    def __init__(self, trainer: Trainer, train: Split, seed: int, folder: Path | None) -> None:
        self.trainer, self.folder = trainer, folder
        if trainer.plan.recipe.compile:
            trainer.compile_all_sizes()
        self.batches = endless(trainer.train_loader)
        self.ahead = warm_up_batches(processes_of(trainer.train_loader))
        self.batch = synthetic_batch(trainer, train, seed)
        size = len(self.batch[1])
        self.flops = step_costs(trainer, *self.batch)[0] / size
        self.steps = len(train) // size if folder else 1
        self.images = size * self.steps

    def read(self) -> None:
        """Read a batch, or an epoch."""
        for _ in range(self.steps):
            next(self.batches)

    def learn(self) -> None:
        """Read a batch, or an epoch, and train on it."""
        for _ in range(self.steps):
            update(self.trainer, *next(self.batches))

    def empty(self) -> None:
        """Use up the loader's stock."""
        for _ in range(self.ahead):
            next(self.batches)

    def turn(self, seconds: float) -> Costs:
        """Measure each part for at least `seconds`."""
        device, costs = self.trainer.device, {}
        self.empty()
        costs["loader"] = 1 / calls_per_sec(self.read, device, seconds, 0) / self.images
        if self.folder is None:  # a network does not know how many images there are
            rate = calls_per_sec(lambda: update(self.trainer, *self.batch), device, seconds)
            costs["network"] = 1 / rate / self.images
        self.empty()
        update(self.trainer, *self.batch)  # meanwhile a loader that is faster fills its stock
        costs["training"] = 1 / calls_per_sec(self.learn, device, seconds, 0) / self.images
        return costs | (read_folder(self.folder) if self.folder else {})


def spread(train: Split, count: int) -> Split:
    """Take so many images from all over the split; above its own number, some several times."""
    return train.take(np.arange(count) * len(train) // count)


def make_links(train: Split, root: Path) -> Path:
    """Make a data folder of links to these images; returns it."""
    for index, (file, label) in enumerate(zip(train.files, train.labels, strict=True)):
        name = f"{index}{Path(file.path).suffix}"
        link = root / "data" / "train" / train.classes[label] / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.realpath(file.path))
    return root / "data"


def read_folder(data: Path) -> Costs:
    """Measure what a first and a second start do with a folder, whose index is kept beside it."""
    source, path = find_source(data, "train", BY_FOLDERS), data.parent / "index.npz"
    start = time.perf_counter()
    stamps = source.stamps()
    index = make_index(source.listing())
    save(path, index, stamps)
    kept = time.perf_counter()
    assert load(path, source.stamps()) is not None, "nobody else writes there"
    found = {"index": kept - start, "index again": time.perf_counter() - kept}
    return {part: seconds / len(index.sizes) for part, seconds in found.items()}


def power_law(xs: Sequence[int], rounds: Sequence[Sequence[float]]) -> Row:
    """Fit cost = a x^k by least squares of the logarithms, round by round, and to their means.

    Returns k with its interval, and the share by which the means are off their fit at most.
    """
    logs = np.log(xs)
    slopes = [float(np.polyfit(logs, np.log(row), 1)[0]) for row in rounds]
    means = np.log(np.mean(rounds, axis=0))
    off = np.abs(means - np.polyval(np.polyfit(logs, means, 1), logs)).max()
    return {"exponent": asdict(estimate(slopes, signed=True)), "off": float(np.expm1(off))}


def along(
    xs: list[int], cases: Sequence[Case], limits: Limits, rounds: int, seconds: float
) -> dict[str, Row]:
    """Measure in turns what one number costs that grows; returns the parts and limits by name."""
    found: list[list[Costs]] = []
    for _ in range(rounds):
        row = [case.turn(seconds) for case in cases]
        decoding, product = limits.turn(seconds)
        ends = [{"limit: decode": decoding, "limit: product": product * c.flops} for c in cases]
        found.append([costs | end for costs, end in zip(row, ends, strict=True)])
    parts: dict[str, Row] = {}
    for part in found[0][0]:
        values = [[costs[part] for costs in row] for row in found]
        means = [asdict(estimate(column)) for column in zip(*values, strict=True)]
        parts[part] = {"seconds_per_image": means, **power_law(xs, values), "rounds": values}
    return parts


def numbers(args: argparse.Namespace, name: str) -> list[int]:
    """Sort what a flag has. Raises UserError for fewer than two different numbers."""
    if len(found := sorted(set(getattr(args, name)))) < 2:
        raise UserError(f"--{name}: name at least two different numbers, to see a growth")
    return found


def measure(config: RunConfig, args: argparse.Namespace) -> Iterator[Row]:
    """Measure all; yields what is known after each axis. Raises UserError naming the flag."""
    sizes, batches, counts = (numbers(args, name) for name in ("sizes", "batches", "counts"))
    world, first = this_process(config), config.recipe.phases[0]
    # Every size reads the same files.
    phase = replace(first, epochs=1, image_size=sizes[0], eval_size=0, data=ORIGINAL)
    size, most = phase.batch_size, max(batches[-1], phase.batch_size)
    train, val = read_data(config.data, say_notes=True)
    if train.in_shards:
        raise UserError(f"--data {config.data.root} holds shards: name a folder of images")
    if counts[0] < size:
        raise UserError(f"--counts {counts[0]}: must be at least the {size} images of a batch")
    if most > len(train):
        raise UserError(f"--batches: must be at most the {len(train)} training images, not {most}")
    limits, done = Limits(config, world, train, size), []
    found: Row = {
        "precision": str(limits.dtype).removeprefix("torch."),
        "backend": chosen_backend(config.data.backend),
        "decoder": limits.decoder,
        "recipe": config.recipe.name,
        "model": config.recipe.model,
        "data": config.data.name,
        "images": len(train),
        "threads": limits.threads,
        "rounds": args.rounds,
        "seconds": args.seconds,  # of each turn, at least
    }
    if limits.device.type == "cuda":
        found["hardware"] = torch.cuda.get_device_name(limits.device)
    axes = (
        ("image size, px", f"batch {size}", sizes, [replace(phase, image_size=x) for x in sizes]),
        (
            "images of a batch",
            f"{sizes[0]} px",
            batches,
            [replace(phase, batch_size=x) for x in batches],
        ),
        ("images of the data set", f"{sizes[0]} px, batch {size}", counts, [phase] * len(counts)),
    )
    with closing(limits.batches), TemporaryDirectory(prefix="growth-") as scratch:
        for name, held, xs, phases in axes:
            print(f"{name}: {' '.join(map(str, xs))}; {held}", flush=True)
            with ExitStack() as stack:
                cases = []
                for x, each in zip(xs, phases, strict=True):
                    images = spread(train, x) if xs is counts else train
                    folder = make_links(images, Path(scratch, str(x))) if xs is counts else None
                    trainer = phase_trainer(config, each, world, images, val)
                    entered = stack.enter_context(trainer)
                    cases.append(Case(entered, images, config.seed, folder))
                parts = along(xs, cases, limits, args.rounds, args.seconds)
                flops = [case.flops for case in cases]
            done.append(
                {"name": name, "held": held, "x": xs, "flops_per_image": flops, "parts": parts}
            )
            yield found | {"axes": done}


def exponent(part: Row) -> str:
    """Format the exponent with its interval: "1.93 (1.90 .. 1.96)"."""
    k, low, high = (f"{round(part['exponent'][key], 2) + 0:.2f}" for key in ("mean", "low", "high"))
    return f"{k} ({low} .. {high})"


def table(result: Row) -> str:
    """Format the result as Markdown."""
    blocks = []
    for axis in result["axes"]:
        parts, xs = axis["parts"].values(), axis["x"]
        rows = [[axis["name"], *axis["parts"]]]
        for index, x in enumerate(xs):
            costs = [shown(part["seconds_per_image"][index], 1000) for part in parts]
            rows.append([f"{x:,}", *costs])
        rows.append(["power", *map(exponent, parts)])
        rows.append(["off", *(f"{part['off']:.1%}" for part in parts)])
        blocks += [f"## {axis['name']} ({axis['held']})", markdown(rows)]
    return document(
        f"# {result['recipe']} on {result['data']}: what an image costs",
        f"{result['hardware']}, {result['threads']} threads; {result['model']}, "
        f"{result['precision']}; {result['backend']}; torch {result['versions']['torch']}; "
        f"{result['date']}; load average {result['load_average']:.1f} before. Milliseconds of this "
        f"machine an image, mean (95 % interval), {result['rounds']} rounds of turns of at least "
        f"{result['seconds']:g} s; {result['images']:,} images; limit by {result['decoder']}.",
        *blocks,
        "\n".join(f"- {name}: {words}" for name, words in DEFINITIONS.items()),
    )


def draw(result: Row) -> Figure:
    """Plot the costs along every axis, one below the other, with the limits beside them."""
    rows = result["axes"]
    figure, panels = figures.new_figure(len(rows), size=(figures.WIDTH, 0.6 + 2.7 * len(rows)))
    for panel, axis in zip(panels, rows, strict=True):
        xs, drawn = axis["x"], []
        for name, look in LOOKS.items():
            if name not in axis["parts"]:
                panel.plot([], [], label=name, markersize=4, **look)  # for the legend of all axes
                continue
            costs = axis["parts"][name]["seconds_per_image"]
            mean, low, high = ([1000 * c[key] for c in costs] for key in ("mean", "low", "high"))
            panel.plot(xs, mean, label=name, markersize=4, **look)
            panel.vlines(xs, low, high, look["color"], linewidth=0.9)
            drawn += mean
        scale(panel, xs, min(drawn), max(drawn))
        power = exponent(axis["parts"]["training"])
        panel.set_title(
            f"{axis['held']}: training as x^{power}", fontsize=figures.SMALL, loc="left"
        )
        panel.set(xlabel=axis["name"], ylabel="ms an image")
    figure.align_ylabels(panels)
    return figures.with_legend(figure, ncols=3, handlelength=2.4)


def scale(panel: Axes, xs: list[int], low: float, high: float) -> None:
    """Set logarithmic scales with plain numbers: the x, and the span of the means."""
    panel.set(xscale="log", yscale="log", ylim=(low / 1.6, high * 1.6))
    panel.set_xticks(xs, [f"{x:,}" for x in xs])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, turn_seconds=3)
    cli.add_machine_flags(parser)
    cli.add_run_flags(parser, "runs/growth-RECIPE-TIME", output_folder)
    add = parser.add_argument
    sizes, batches, counts = [64, 96, 128, 160], [8, 16, 32, 64], [500, 2000, 8000]
    help_text = "image sizes; default 64 96 128 160"
    add("--sizes", type=at_least(8), nargs="+", default=sizes, metavar="S", help=help_text)
    help_text = "images of a batch; default 8 16 32 64"
    add("--batches", type=at_least(2), nargs="+", default=batches, metavar="B", help=help_text)
    help_text = "images of the data set, whole epochs of which are trained; default 500 2000 8000"
    add("--counts", type=at_least(1), nargs="+", default=counts, metavar="N", help=help_text)
    args, about = begin(parser, argv)
    with run_config(args, "growth-") as config:
        for measured in measure(config, args):
            result = about | measured
            write_result(config.folder, "growth", result, table(result))
        figures.write_files(draw(result), config.folder, "growth")
    print(f"\n{table(result)}\nall of it: {config.folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
