"""Where the time of DALI's CPU path goes: its graph, cut off after each stage.

    python -m benchmarks.research.dali_stages --data DIR --size 224

All stages read the same random-area crops, take turns, and are given as images/s and as CPU time an
image, which other work on the machine disturbs less. `loader` is the back end as training uses it;
it has torch resize and normalise. `dali resize` and `dali normalise` are what DALI takes for that.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nvidia.dali import fn
from nvidia.dali.data_node import DataNode

from benchmarks.common.measuring import (
    add_data_flag,
    add_json_flag,
    add_round_flags,
    facts,
    markdown,
    training_images,
)
from benchmarks.common.statistics import Estimate, estimate, ratio
from benchmarks.loaders.contestants import MIN_SCALE, Task, ours
from pipelines import cli
from pipelines.backends.dali.graph import (
    decode_whole,
    decode_window,
    normalise,
    random_window,
    resize,
    shape_of,
)
from pipelines.backends.dali.loader import Feed, empty_pipeline, with_paths
from pipelines.cli import Parser, at_least, make_parser
from pipelines.files import write_object
from pipelines.loader import LoaderSpec, Stage
from pipelines.sampling import BatchSampler

STAGES = (
    *("feed", "read", "header", "window", "decode whole"),
    *("decode crop", "dali resize", "dali normalise", "loader"),
)
"""The crop's decoding follows `window`; `decode whole` is beside it, for comparison."""
WARM_UP_BATCHES = 6
"""Before each turn: more than any stage makes ahead."""


@dataclass(frozen=True, kw_only=True)
class StageRate:
    """One stage, with all before it; intervals are over the rounds."""

    stage: str
    images_per_sec: Estimate
    cpu_ms_per_image: Estimate
    """Of all threads of this process."""
    ratio_to_loader: Estimate
    """Of the images per second, round by round."""


def graph(
    stage: str, spec: LoaderSpec, files: DataNode, crop_params: list[DataNode], view: list[DataNode]
) -> DataNode:
    """Return what the pipeline gives when it ends with this stage."""
    if stage == "feed":
        return files
    encoded = fn.io.file.read(files)
    if stage == "read":
        return encoded
    if stage == "header":
        return fn.stack(*shape_of(encoded))
    if stage == "decode whole":
        return decode_whole(spec, encoded)
    start, shape = random_window(spec, encoded, *crop_params)
    if stage == "window":
        return fn.stack(*start, *shape)
    images = decode_window(spec, encoded, start, shape)
    if stage == "decode crop":
        return images
    size, mirror = view
    images = resize(images, size[0], size[1])
    return images if stage == "dali resize" else normalise(spec, images, mirror=mirror)


def batches(stage: str, task: Task) -> Iterator[Any]:
    """Yield batches of a stage, without end."""
    if stage == "loader":
        yield from ours("dali", task)
    size = Stage(
        epochs=1, image_size=task.image_size, batch_size=task.batch_size, min_scale=MIN_SCALE
    )
    spec = LoaderSpec(split=task.split, stages=(size,), training=True, num_threads=task.threads)
    feed = Feed(spec, with_paths(BatchSampler(spec).batches(0, 0)), finish=stage.startswith("dali"))
    pipeline = empty_pipeline(spec)
    with pipeline:
        files, labels, crop_params, view = feed.nodes()
        pipeline.set_outputs(graph(stage, spec, files, crop_params, view), labels)
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


def measure(
    task: Task, rounds: int, seconds: float, report: Callable[[str], object]
) -> list[StageRate]:
    """Measure all stages in turn."""
    sources = {stage: batches(stage, task) for stage in STAGES}
    found: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES}
    for number in range(rounds + 1):
        for stage, source in sources.items():
            rate, cpu = turn(source, task.batch_size, seconds if number else 0.1)
            if number:  # round 0: files into the page cache, buffers to their size
                found[stage].append((rate, cpu))
                report(f"round {number}  {stage:14} {rate:8.1f} images/s  {cpu:.3f} CPU ms/image")
    loader = [rate for rate, _ in found["loader"]]
    return [
        StageRate(
            stage=stage,
            images_per_sec=estimate([rate for rate, _ in turns]),
            cpu_ms_per_image=estimate([cpu for _, cpu in turns]),
            ratio_to_loader=ratio([rate for rate, _ in turns], loader),
        )
        for stage, turns in found.items()
    ]


def table(rates: Sequence[StageRate]) -> str:
    """Format as Markdown; `own` is what a stage adds to the one before it, in CPU time."""
    before = dict(zip(STAGES[1:], STAGES, strict=False)) | {"decode crop": "window"}
    cpu = {rate.stage: rate.cpu_ms_per_image.mean for rate in rates}
    rows = [("stage", "images/s", "CPU ms/image", "own", "share of loader")]
    for rate in rates:
        previous = "decode crop" if rate.stage == "loader" else before.get(rate.stage, "")
        own = cpu[rate.stage] - cpu.get(previous, 0.0)
        cells = (str(rate.images_per_sec), str(rate.cpu_ms_per_image), f"{own:.3f}")
        rows.append((rate.stage, *cells, f"{100 * own / cpu['loader']:.0f} %"))
    return markdown(rows)


def parser() -> Parser:
    """Build the command line."""
    result = make_parser(
        "benchmarks.research.dali_stages",
        "Measure the stages of DALI's CPU path in turns, and what the whole loader takes.",
        "python -m benchmarks.research.dali_stages --data imagenet --size 224",
    )
    add = result.add_argument
    add_data_flag(result)
    add("--size", type=at_least(1), default=224, metavar="S", help="default 224")
    add("--batch-size", type=at_least(1), default=64, help="default 64")
    add("--threads", type=at_least(1), default=2, help="default 2")
    add_round_flags(result, 5)
    add_json_flag(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    about = facts("research.dali_stages", argv)
    about["hardware"] += f", {args.threads} threads, {args.size} px"
    task = Task(
        split=training_images(args.data),
        image_size=args.size,
        batch_size=args.batch_size,
        threads=args.threads,
    )
    rates = measure(task, args.rounds, args.seconds, lambda line: print(line, flush=True))
    print(f"\n{about['hardware']} (95 % intervals)\n\n{table(rates)}")
    if args.json is not None:
        write_object(args.json, about | {"stages": [asdict(rate) for rate in rates]})
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
