"""What an image costs a training by image size, batch size and number of images, and the limits.

    python -m benchmarks.research.growth --data DIR --recipe photos-scratch --sizes 64 96 128 160

In each round all sizes take turns, then all batch sizes, then all numbers of images: the loader
alone (decoding and augmentation), the network alone (forward, backward and update on a synthetic
batch that stays on the device) and training, which is both. Batch sizes and numbers of images are
measured at the smallest size, where what does not grow with the pixels shows most. A data set of N
images costs whole epochs, so that the start of an epoch is in it, and the reading of a folder of N
links to them: "index" without an index, "index again" with the one that it has left. N may be above
the number of images: then some have several names. One process on one device.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
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
    WARM_UP_BATCHES,
    calls_per_sec,
    endless,
    matmul_flops_per_sec,
    phase_trainer,
    run_config,
    step_costs,
    synthetic_batch,
    this_process,
    update,
)
from benchmarks.common.statistics import estimate, short, shown
from benchmarks.loaders.contestants import Task, decode, decode_crops
from fastimagenet import cli
from fastimagenet.config import RunConfig
from fastimagenet.distributed.world import World
from fastimagenet.recipes.recipe import Phase
from fastimagenet.report import figures
from fastimagenet.run import read_data
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

LOOKS: dict[str, dict[str, Any]] = {
    "loader": {"color": figures.BLUE, "marker": "o"},
    "network": {"color": figures.ORANGE, "marker": "s"},
    "training": {"color": figures.BLACK, "marker": "D"},
    "index": {"color": figures.PURPLE, "marker": "^"},
    "index again": {"color": figures.SKY, "marker": "v"},
    "limit: decode": {"color": figures.GREEN, "linestyle": (0, (5, 2))},
    "limit: product": {"color": figures.VERMILLION, "linestyle": (0, (1.2, 1.2))},
}
TICKS = 30.0
"""Where costs differ by less, ticks stand at 2 and 5, too."""
DEFINITIONS = {
    "loader": "the loader alone: reading, decoding, augmentation.",
    "network": "forward, backward and update alone, on a synthetic batch.",
    "training": "both together; on a CPU they share the cores.",
    "index, index again": "reading a folder of so many links without an index, and with one.",
    "decode": "limit: the JPEGs decoded and nothing else, by as many threads of the CPU",
    "product": "limit: the network's matrix products and convolutions as counted, at the rate of a "
    "large matrix product measured here.",
    "power": "the exponent k of a x^k, fitted to the points of this table alone: it says nothing "
    "beyond them, and little where the fit is far off; off: of the means, at most.",
}
Costs = dict[str, float]
"""Seconds of this machine for an image, by part."""


@dataclass
class Case:
    """A trainer that takes its turns, warmed up; `steps`: batches that are measured as one."""

    trainer: Trainer
    train: Split
    seed: int
    steps: int = 1

    def __post_init__(self) -> None:
        if self.trainer.plan.recipe.compile:
            self.trainer.compile_all_sizes()
        self.size = self.trainer.plan.phases[0].batch_size
        self.batches = endless(self.trainer.train_loader)
        self.batch = synthetic_batch(self.trainer, self.train, self.seed)
        self.flops = step_costs(self.trainer, *self.batch)[0] / self.size
        self.refill()

    def refill(self) -> None:
        """Use up the loader's stock; what it makes ahead, it then makes during one update."""
        for _ in range(WARM_UP_BATCHES):
            batch = next(self.batches)
        update(self.trainer, *batch)

    def read(self) -> None:
        """Read so many batches, as many as an epoch has where epochs are measured."""
        for _ in range(self.steps):
            next(self.batches)

    def learn(self) -> None:
        """Train on so many batches."""
        for _ in range(self.steps):
            update(self.trainer, *next(self.batches))

    def turn(self, seconds: float) -> Costs:
        """Measure each part for at least `seconds`."""
        device, images = self.trainer.device, self.steps * self.size
        for _ in range(WARM_UP_BATCHES):
            next(self.batches)
        costs = {"loader": 1 / calls_per_sec(self.read, device, seconds, 0) / images}
        if self.steps == 1:  # a network does not know how many images there are
            rate = calls_per_sec(lambda: update(self.trainer, *self.batch), device, seconds)
            costs["network"] = 1 / rate / images
        self.refill()
        return costs | {"training": 1 / calls_per_sec(self.learn, device, seconds, 0) / images}


def spread(train: Split, count: int) -> Split:
    """Take so many images from all over the split; above its own number, some several times."""
    return train.take(np.arange(count) * len(train) // count)


def make_links(train: Split, root: Path) -> Path:
    """Make a data folder of links to these images; returns it."""
    for index, (file, label) in enumerate(zip(train.files, train.labels, strict=True)):
        target = root / "data" / "train" / train.classes[label] / f"{index}_{Path(file.path).name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.realpath(file.path))
    return root / "data"


def read_folder(data: Path) -> Costs:
    """Measure the seconds of reading a folder of images as the first and as the second start do.

    The index is kept beside the folder in place of the user's cache.
    """
    source, path = find_source(data, "train", BY_FOLDERS), data.parent / "index.npz"
    start = time.perf_counter()
    stamps = source.stamps()
    index = make_index(source.listing())
    save(path, index, stamps)
    kept = time.perf_counter()
    assert load(path, source.stamps()) is not None, "nobody else writes there"
    found = {"index": kept - start, "index again": time.perf_counter() - kept}
    return {part: seconds / len(index.listing.images) for part, seconds in found.items()}


def power_law(xs: Sequence[int], rounds: Sequence[Sequence[float]]) -> Row:
    """Fit cost = a x^k by least squares of the logarithms.

    Returns k, with its interval over the rounds, and the share by which the fit of the means is off
    at most: intervals say nothing of costs that follow no power.
    """
    logs = np.log(xs)
    slopes = [float(np.polyfit(logs, np.log(row), 1)[0]) for row in rounds]
    means = np.log(np.mean(rounds, axis=0))
    off = np.abs(means - np.polyval(np.polyfit(logs, means, 1), logs)).max()
    return {"exponent": asdict(estimate(slopes, signed=True)), "misfit": float(np.expm1(off))}


class Limits:
    """What no training can be faster than: mere decoding of these files, and a matrix product."""

    def __init__(self, config: RunConfig, world: World, train: Split, batch_size: int) -> None:
        recipe, kind = config.recipe, world.device.partition(":")[0]
        self.device = torch.device(world.device)
        self.dtype = autocast_dtype(recipe.precision, kind) or torch.float32
        self.batch_size, self.threads = batch_size, max(1, num_cores() // world.local_world_size)
        crops = chosen_backend(config.data.backend) == "dali" and not recipe.reflect_pad
        self.decoder = "windows of 25 to 100 %, DALI" if crops else "whole images, Pillow"
        task = Task(split=train, image_size=0, batch_size=batch_size, threads=self.threads)
        self.batches = (decode_crops if crops else decode)(task)
        try:
            next(self.batches)
        except UserError as error:
            raise UserError(f"--data {config.data.root}: {error}") from None

    def turn(self, seconds: float) -> Costs:
        """Measure seconds an image of decoding, and seconds a FLOP of a product."""
        rate = calls_per_sec(lambda: next(self.batches), self.device, seconds, WARM_UP_BATCHES)
        product = matmul_flops_per_sec(self.device, self.dtype, seconds)
        return {"decode": 1 / rate / self.batch_size, "product": 1 / product}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What is measured, and on what."""

    config: RunConfig
    world: World
    train: Split
    val: Split
    phase: Phase
    """At the smallest size."""
    limits: Limits
    rounds: int
    seconds: float

    def along(
        self, name: str, xs: list[int], phases: list[Phase], folders: Sequence[Path] = ()
    ) -> Row:
        """Measure what one number costs that grows: x and the phase of each.

        With `folders` of images, by x: whole epochs of so many images, and reading their folders.
        """
        found: list[list[Costs]] = []
        limits: list[Costs] = []
        with ExitStack() as stack:
            cases = []
            for x, phase in zip(xs, phases, strict=True):
                train = spread(self.train, x) if folders else self.train
                trainer = phase_trainer(self.config, phase, self.world, train, self.val)
                steps = x // phase.batch_size if folders else 1
                seed = self.config.seed
                cases.append(Case(stack.enter_context(trainer), train, seed, steps))
            for number in range(self.rounds):
                print(f"{name} {xs}: round {number + 1} of {self.rounds}", flush=True)
                found.append([case.turn(self.seconds) for case in cases])
                for costs, folder in zip(found[-1], folders, strict=False):
                    costs |= read_folder(folder)
                limits.append(self.limits.turn(self.seconds))
        parts: Row = {}
        for part in found[0][0]:
            rounds = [[costs[part] for costs in row] for row in found]
            means = [asdict(estimate(column)) for column in zip(*rounds, strict=True)]
            parts[part] = {"seconds_per_image": means, **power_law(xs, rounds), "rounds": rounds}
        ends = {key: estimate([row[key] for row in limits]) for key in limits[0]}
        product = [ends["product"].mean * case.flops for case in cases]
        return {
            "name": name,
            "x": xs,
            "batch_size": sorted({phase.batch_size for phase in phases}),
            "image_size": sorted({phase.image_size for phase in phases}),
            "parts": parts,
            "decode_seconds_per_image": asdict(ends["decode"]),
            "seconds_per_flop": asdict(ends["product"]),
            "flops_per_image": [case.flops for case in cases],
            "product_seconds_per_image": product,
        }

    def axes(self, sizes: list[int], batches: list[int], counts: list[int]) -> Iterator[Row]:
        """Measure along one axis after the other."""
        by_size = [replace(self.phase, image_size=size) for size in sizes]
        yield self.along("image size", sizes, by_size)
        by_batch = [replace(self.phase, batch_size=batch) for batch in batches]
        yield self.along("images of a batch", batches, by_batch)
        with TemporaryDirectory(prefix="growth-") as scratch:
            folders = [
                make_links(spread(self.train, count), Path(scratch, str(count))) for count in counts
            ]
            yield self.along("images of the data set", counts, [self.phase] * len(counts), folders)


def different(flag: str, numbers: Sequence[int]) -> list[int]:
    """Sort the numbers. Raises UserError for fewer than two different ones."""
    if len(set(numbers)) < 2:
        raise UserError(f"{flag}: name at least two different numbers, to see a growth")
    return sorted(set(numbers))


def measure(config: RunConfig, args: argparse.Namespace) -> Iterator[Row]:
    """Measure all; yields what is known after each axis. Raises UserError naming the flag."""
    sizes, batches, counts = (
        different(f"--{name}", getattr(args, name)) for name in ("sizes", "batches", "counts")
    )
    # All layers learn from the start; every size reads the same files.
    config = replace(config, recipe=replace(config.recipe, frozen_epochs=0))
    world, first = this_process(config), config.recipe.phases[0]
    phase = replace(first, epochs=1, image_size=sizes[0], eval_size=0, data=ORIGINAL)
    train, val = read_data(config.data, say_notes=True)
    if train.in_shards:
        raise UserError(f"--data {config.data.root} holds shards: name a folder of images")
    if counts[0] < phase.batch_size:
        least = f"a batch of {phase.batch_size}: --set phases.0.batch_size={counts[0]} or less"
        raise UserError(f"--counts {counts[0]}: fewer images than {least}, or larger counts")
    if max(batches[-1], phase.batch_size) > len(train):
        asked = max(batches[-1], phase.batch_size)
        raise UserError(f"--batches: {asked} in a batch are more than {len(train)} training images")
    limits = Limits(config, world, train, phase.batch_size)
    growth = Growth(config=config, world=world, train=train, val=val, phase=phase, limits=limits,
                    rounds=args.rounds, seconds=args.seconds)  # fmt: skip
    on_gpu = limits.device.type == "cuda"
    found: Row = {
        **({"hardware": torch.cuda.get_device_name(limits.device)} if on_gpu else {}),
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
    done: list[Row] = []
    with closing(limits.batches):
        for axis in growth.axes(sizes, batches, counts):
            done.append(axis)
            yield found | {"axes": done}


def held(axis: Row) -> str:
    """Say what stays as it is along an axis."""
    size, batch = axis["image_size"], axis["batch_size"]
    kept = [f"{size[0]} px"] if len(size) == 1 else []
    return ", ".join(kept + ([f"batch {batch[0]}"] if len(batch) == 1 else []))


def table(result: Row) -> str:
    """Format the result as Markdown."""
    blocks = []
    for axis in result["axes"]:
        parts, xs = axis["parts"], axis["x"]
        decode = shown(axis["decode_seconds_per_image"], 1000)
        rows = [[axis["name"], *parts, "decode", "product"]]
        for index, x in enumerate(xs):
            costs = [shown(part["seconds_per_image"][index], 1000) for part in parts.values()]
            product = short(1000 * axis["product_seconds_per_image"][index])
            rows.append([f"{x:,}", *costs, decode, product])
        rows.append(["power", *(shown(part["exponent"]) for part in parts.values()), "", ""])
        off = [f"{100 * part['misfit']:.1f} %" for part in parts.values()]
        rows.append([f"off, {xs[0]:,} to {xs[-1]:,}", *off, "", ""])
        blocks += [f"## Along the {axis['name']} ({held(axis)})", markdown(rows)]
    return document(
        f"# {result['recipe']} on {result['data']}: what an image costs",
        f"{result['hardware']}, {result['threads']} threads; {result['model']}, "
        f"{result['precision']}; {result['backend']}; torch {result['versions']['torch']}; "
        f"{result['date']}; load average {result['load_average']:.1f} before. Milliseconds of this "
        f"machine an image, mean (95 % interval), {result['rounds']} rounds of turns of "
        f"{result['seconds']:g} s or more; {result['images']:,} different images.",
        *blocks,
        "\n".join(f"- {name}: {words}" for name, words in DEFINITIONS.items()).replace(
            "of the CPU", f"of the CPU ({result['decoder']})."
        ),
    )


def draw(result: Row) -> Figure:
    """Plot the costs along every axis, one below the other, with the limits beside them."""
    rows = result["axes"]
    figure, panels = figures.new_figure(len(rows), size=(figures.WIDTH, 0.6 + 2.6 * len(rows)))
    for name, look in LOOKS.items():  # the legend has those of all axes
        if any(name in axis["parts"] for axis in rows) or name.startswith("limit"):
            panels[0].plot([], [], label=name, markersize=4, **look)
    for panel, axis in zip(panels, rows, strict=True):
        xs, means = axis["x"], list(axis["product_seconds_per_image"])
        for name, part in axis["parts"].items():
            costs = [part["seconds_per_image"][index] for index in range(len(xs))]
            ends = [
                [1000 * (cost["mean"] - cost["low"]) for cost in costs],
                [1000 * (cost["high"] - cost["mean"]) for cost in costs],
            ]
            values = [1000 * cost["mean"] for cost in costs]
            panel.errorbar(xs, values, ends, markersize=4, elinewidth=0.9, **LOOKS[name])
            means += [cost["mean"] for cost in costs]
        decode = axis["decode_seconds_per_image"]["mean"]
        panel.axhline(1000 * decode, **LOOKS["limit: decode"])
        product = [1000 * value for value in axis["product_seconds_per_image"]]
        panel.plot(xs, product, **LOOKS["limit: product"])
        scale(panel, xs, [*means, decode])
        power = shown(axis["parts"]["training"]["exponent"])
        panel.set_title(f"{held(axis)}; training ~ x^{power}", fontsize=figures.SMALL, loc="left")
        unit = ", px" if axis["name"] == "image size" else ""
        panel.set(xlabel=axis["name"] + unit, ylabel="ms an image")
    figure.align_ylabels(panels)
    return figures.with_legend(figure, ncols=3, handlelength=2.4)


def scale(panel: Axes, xs: list[int], means: list[float]) -> None:
    """Set logarithmic scales with plain numbers: each x, and what the means (in s) span."""
    low, high = 1000 * min(means), 1000 * max(means)
    panel.set(xscale="log", yscale="log", ylim=(low / 1.6, high * 1.6))
    panel.set_xticks(xs, [f"{x:,}" for x in xs])
    panel.xaxis.set_minor_locator(NullLocator())
    if high < TICKS * low:
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
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
