"""What saving costs the training: blocks of steps with a checkpoint and without, in turns.

    python -m benchmarks.research.checkpoint_cost --data DIR --recipe imagenet --device cuda

Updates of the recipe's first phase on a synthetic batch that stays on the device, so that no loader
hides a wait. A block with a checkpoint begins with saving as the training does, beside the steps,
and ends when it is on the disk; "in line" waits for the disk first. One process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.common.measuring import begin, command_parser, document, markdown, write_result
from benchmarks.common.rates import (
    phase_trainer,
    run_config,
    synchronize,
    synthetic_batch,
    this_process,
    update,
)
from benchmarks.common.statistics import estimates, ratio, shown
from fastimagenet import cli
from fastimagenet.config import RunConfig
from fastimagenet.images import read_data
from fastimagenet.report.summary import hardware
from fastimagenet.training import checkpoint
from fastimagenet.training.checkpoint import CheckpointWriter, copied
from fastimagenet.training.recorder import NullRecorder
from fastimagenet.training.trainer import Trainer
from pipelines.cli import at_least, output_folder
from pipelines.files import Row

WAYS = ("without", "beside", "in line")
PARTS = ("state", "copy", "write", "checksum", "fsync")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__)
    cli.add_machine_flags(parser)
    default = "runs/checkpoint-cost-RECIPE-TIME; its disk is the one measured"
    cli.add_run_flags(parser, default, output_folder)
    add = parser.add_argument
    add("--interval", type=at_least(1), default=100, help="steps of a block; default 100")
    add("--rounds", type=at_least(2), default=5, help="at least 2, for intervals; default 5")
    args, about = begin(parser, argv)
    with run_config(args, "checkpoint-cost-") as config:
        return measured(args, about, config)


def measured(args: argparse.Namespace, about: Row, config: RunConfig) -> int:
    """Measure, write and print the results; returns the exit status."""
    phase, output = config.recipe.phases[0], config.folder
    output.mkdir(parents=True, exist_ok=True)
    world = this_process(config)
    train, val = read_data(config.data, say_notes=True)
    with (
        tempfile.TemporaryDirectory(dir=output) as folder,
        phase_trainer(config, phase, world, train, val) as trainer,
    ):
        images, labels = synthetic_batch(trainer, train, config.seed)
        if config.recipe.compile:
            trainer.compile_all_sizes()
        step = partial(update, trainer, images, labels)
        result = about | measure(trainer, step, args.interval, args.rounds, Path(folder))
        result |= {"hardware": hardware(trainer), "precision": trainer.precision}
        result |= {"recipe": config.recipe.name, "image_size": phase.image_size}
        result |= {"batch_size": len(images), "interval": args.interval, "rounds": args.rounds}
    write_result(output, "checkpoint_cost", result, table(result))
    print(f"{table(result)}\nall of it: {output}", flush=True)
    return 0


def measure(
    trainer: Trainer, step: Callable[[], None], interval: int, rounds: int, folder: Path
) -> Row:
    """Measure seconds a step in each way and the parts of a save, after a round not counted."""
    writer = CheckpointWriter(folder, NullRecorder())
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in range(rounds + 1):
        steps = interval if number else 2  # round 0: buffers to size
        for way in WAYS if number % 2 else WAYS[::-1]:
            spent = block(trainer, step, steps, writer, way)
            seconds[way] += [spent / steps] if number else []
        for part, spent in save_parts(trainer, folder / "parts.pt").items():
            parts[part] += [spent] if number else []
    return {
        "bytes": (folder / checkpoint.LAST).stat().st_size,
        "step_seconds": estimates(seconds),
        "added": {way: added(seconds[way], seconds["without"]) for way in WAYS[1:]},
        "save_seconds": estimates(parts),
        "rounds_step_seconds": seconds,
        "rounds_save_seconds": parts,
    }


def added(seconds: list[float], base: list[float]) -> Row:
    """Compute the share by which they are above those of the same rounds."""
    return {name: value - 1 for name, value in asdict(ratio(seconds, base)).items()}


def block(
    trainer: Trainer, step: Callable[[], None], steps: int, writer: CheckpointWriter, way: str
) -> float:
    """Measure seconds of so many steps, with a checkpoint at their start or without."""
    synchronize(trainer.device)
    start = time.perf_counter()
    if way != "without":
        writer.save(trainer.state_dict())
    if way == "in line":
        writer.finish()
    for number in range(steps):
        step()
        if number % 10 == 9:  # as a training's log step does
            synchronize(trainer.device)
    synchronize(trainer.device)
    writer.finish()
    return time.perf_counter() - start


def save_parts(trainer: Trainer, path: Path) -> dict[str, float]:
    """Measure the parts of a save in seconds, one after the other, nothing beside them."""
    times = [time.perf_counter()]
    state = trainer.state_dict()
    times.append(time.perf_counter())
    state = copied(state)
    synchronize(trainer.device)
    times.append(time.perf_counter())
    with path.open("w+b") as file:
        torch.save(state, file)
        file.flush()
        times.append(time.perf_counter())
        checkpoint.seal(file)
        file.flush()
        times.append(time.perf_counter())
        os.fsync(file.fileno())
        times.append(time.perf_counter())
    path.unlink()
    spans = (end - start for start, end in pairwise(times))
    return dict(zip(PARTS, spans, strict=True))


def table(result: Row) -> str:
    """Format the result as Markdown."""
    rows = [("checkpoint", "ms a step", "added")]
    for way, value in result["step_seconds"].items():
        share = shown(result["added"][way], 100, " %") if way in result["added"] else "-"
        rows.append((way, shown(value, 1e3), share))
    parts = [PARTS, [shown(result["save_seconds"][part], 1e3) for part in PARTS]]
    return document(
        f"# {result['recipe']}: a checkpoint every {result['interval']} steps",
        f"{result['hardware']}; {result['precision']}; {result['image_size']} px, batch "
        f"{result['batch_size']}; torch {result['versions']['torch']}; {result['date']}; load "
        f"average {result['load_average']:.1f} before; {result['rounds']} rounds, mean (95 % "
        "interval).",
        markdown(rows),
        f"A save by itself, ms, {result['bytes'] / 1e6:.1f} MB:",
        markdown(parts),
    )


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
