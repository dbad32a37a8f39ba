"""Where the time of DALI's CPU path goes: its graph, cut off after each stage.

    python -m benchmarks.research.dali_stages --data DIR --size 224

All stages read the same random-area crops, take turns, and are given as images/s and as CPU time an
image, which other work on the machine disturbs less. `loader` is the back end as training uses it;
it has torch resize and normalise. `dali resize` and `dali normalise` are what DALI takes for that.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from nvidia.dali.data_node import DataNode

from benchmarks.common.measuring import begin, command_parser, markdown, training_images
from benchmarks.common.statistics import estimate, ratio, shown
from benchmarks.loaders.contestants import Task, ours
from pipelines import cli
from pipelines.backends.dali.feed import Feed, with_paths
from pipelines.backends.dali.graph import (
    Inputs,
    checked,
    decode_whole,
    decode_window,
    encoded_files,
    finished_graph,
    resize,
)
from pipelines.backends.dali.loader import empty_pipeline
from pipelines.cli import at_least
from pipelines.files import Row, write_object
from pipelines.loader import LoaderSpec
from pipelines.sampling import BatchSampler

STAGES = (
    *("feed", "read", "header", "decode whole"),
    *("decode crop", "dali resize", "dali normalise", "loader"),
)
"""The crop's decoding follows `header`; `decode whole` is beside it, for comparison."""
WARM_UP_BATCHES = 6
"""Before each turn: more than any stage makes ahead."""


def graph(stage: str, spec: LoaderSpec, inputs: Inputs) -> DataNode:
    """Return what the pipeline gives when it ends with this stage."""
    if stage == "feed":
        return inputs["files"]
    encoded = encoded_files(inputs, packed=False)
    if stage == "read":
        return encoded
    encoded = checked(encoded, inputs)
    if stage == "header":
        return encoded
    if stage == "decode whole":
        return decode_whole(spec, encoded)
    images = decode_window(spec, encoded, inputs)
    if stage == "decode crop":
        return images
    if stage == "dali resize":
        return resize(images, inputs["size"])
    return finished_graph(spec, images, inputs)


def batches(stage: str, task: Task) -> Iterator[Any]:
    """Yield batches of a stage, without end."""
    if stage == "loader":
        yield from ours("dali", task)
    spec = task.spec
    feed = Feed(spec, with_paths(BatchSampler(spec).batches(0, 0)), finish=stage.startswith("dali"))
    pipeline = empty_pipeline(spec)
    with pipeline:
        pipeline.set_outputs(graph(stage, spec, feed.nodes()))
    pipeline.build()
    while True:
        yield pipeline.run()


def turn(source: Iterator[Any], batch_size: int, seconds: float) -> tuple[float, float]:
    """Measure images per second and CPU ms an image, after batches that are not counted."""
    for _ in range(WARM_UP_BATCHES):
        next(source)
    images, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        next(source)
        images += batch_size
    cpu = time.process_time() - cpu
    return images / (time.perf_counter() - start), 1000 * cpu / images


def measure(task: Task, rounds: int, seconds: float) -> list[Row]:
    """Measure all stages in turn, each with all before it: images/s, ms of CPU time an image of
    all threads of this process, and the ratio of the images/s to the loader's, round by round."""
    sources = {stage: batches(stage, task) for stage in STAGES}
    rates: dict[str, list[float]] = {stage: [] for stage in STAGES}
    cpus: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for number in range(rounds + 1):
        for stage, source in sources.items():
            rate, cpu = turn(source, task.batch_size, seconds if number else 0.1)
            if number:  # round 0: files into the page cache, buffers to their size
                rates[stage].append(rate)
                cpus[stage].append(cpu)
                told = f"{rate:8.1f} images/s  {cpu:.3f} CPU ms/image"
                print(f"round {number}  {stage:14} {told}", flush=True)
    return [
        {
            "stage": stage,
            "images_per_sec": asdict(estimate(rates[stage])),
            "cpu_ms_per_image": asdict(estimate(cpus[stage])),
            "ratio_to_loader": asdict(ratio(rates[stage], rates["loader"])),
        }
        for stage in STAGES
    ]


def table(rates: Sequence[Row]) -> str:
    """Format as Markdown; `own` is what a stage adds to the one before it, in CPU time."""
    before = dict(zip(STAGES[1:], STAGES, strict=False))
    before |= {"decode crop": "header", "loader": "decode crop"}
    cpu = {rate["stage"]: rate["cpu_ms_per_image"]["mean"] for rate in rates}
    rows = [("stage", "images/s", "CPU ms/image", "own", "share of loader")]
    for rate in rates:
        stage = rate["stage"]
        own = cpu[stage] - cpu.get(before.get(stage, ""), 0.0)
        cells = (shown(rate["images_per_sec"]), shown(rate["cpu_ms_per_image"]), f"{own:.3f}")
        rows.append((stage, *cells, f"{100 * own / cpu['loader']:.0f} %"))
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, data=True, turn_seconds=5, json=True)
    add = parser.add_argument
    add("--size", type=at_least(1), default=224, metavar="S", help="default 224")
    add("--batch-size", type=at_least(1), default=64, help="default 64")
    add("--threads", type=at_least(1), default=2, help="default 2")
    args, about = begin(parser, argv)
    about["hardware"] += f", {args.threads} threads, {args.size} px"
    split, size = training_images(args.data), args.batch_size
    task = Task(split=split, image_size=args.size, batch_size=size, threads=args.threads)
    rates = measure(task, args.rounds, args.seconds)
    print(f"\n{about['hardware']} (95 % intervals)\n\n{table(rates)}")
    if args.json is not None:
        write_object(args.json, about | {"stages": rates})
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
