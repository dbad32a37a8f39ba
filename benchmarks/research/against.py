"""How fast the DALI loader is in this tree, against another one: a worktree of the commit before.

    python -m benchmarks.research.against --before TREE --data DIR --size 224

Both read the same training batches and take turns, the other tree in a process of its own. CPU time
is that of all threads of a process, which other work on the machine disturbs less than the rate;
the main thread's, of a batch, is what training cannot overlap with launching its next step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common.measuring import begin, command_parser, markdown, training_images
from benchmarks.common.statistics import estimate, ratio, shown
from benchmarks.loaders.contestants import Task, ours
from pipelines import cli
from pipelines.cli import at_least
from pipelines.errors import UserError
from pipelines.files import Row, write_object

WARM_UP_BATCHES = 8
"""Before each turn: more than any loader makes ahead."""
MEASURES = {"images_per_sec": "images/s", "cpu_ms": "CPU ms/image", "main_ms": "main ms/batch"}
SERVE = "serve"
"""First argument of the process of the other tree, which runs this file by its path."""
Turn = Callable[[float], dict[str, float]]
"""Reads for so many seconds; returns MEASURES."""


@contextmanager
def loader_here(data: str, size: int, batch_size: int, threads: int) -> Iterator[Turn]:
    """Open a loader of the tree that this process imports."""
    shape = {"image_size": size, "batch_size": batch_size, "threads": threads}
    task = Task(split=training_images(Path(data)), **shape)
    with closing(ours("dali", task)) as batches:

        def turn(seconds: float) -> dict[str, float]:
            for _ in range(WARM_UP_BATCHES):
                next(batches)
            count, start = 0, (time.perf_counter(), time.process_time(), time.thread_time())
            while time.perf_counter() - start[0] < seconds:
                next(batches)
                count += 1
            wall, cpu, main = (
                now() - then
                for now, then in zip(
                    (time.perf_counter, time.process_time, time.thread_time), start, strict=True
                )
            )
            images = count * batch_size
            values = (images / wall, 1000 * cpu / images, 1000 * main / count)
            return dict(zip(MEASURES, values, strict=True))

        yield turn


@contextmanager
def loader_there(tree: Path, arguments: Sequence[Any]) -> Iterator[Turn]:
    """Open the same one of another tree, in a process. Raises UserError where it does not run."""
    process = subprocess.Popen(
        [sys.executable, __file__, SERVE, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def turn(seconds: float) -> dict[str, float]:
        assert process.stdin is not None and process.stdout is not None
        print(seconds, file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise UserError(f"--before {tree}: its loader does not run; see above")
        found: dict[str, float] = json.loads(line)
        return found

    try:
        yield turn
    finally:
        process.stdin.close()  # it ends
        process.stdout.close()
        process.wait()


def serve(data: str, *numbers: str) -> None:
    """Be the process of `loader_there`: take turns for as long as seconds are asked for."""
    with loader_here(data, *map(int, numbers)) as turn:
        for line in sys.stdin:
            print(json.dumps(turn(float(line))), flush=True)


def compare(rounds: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Compute each measure's means, and its ratio of after to before, round by round."""
    rows: list[Row] = []
    for name in MEASURES:
        values = {tree: [turn[name] for turn in turns] for tree, turns in rounds.items()}
        row: Row = {tree: asdict(estimate(found)) for tree, found in values.items()}
        rows.append({"measure": name} | row | {"ratio": asdict(ratio(*reversed(values.values())))})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, data=True, turn_seconds=4, json=True)
    add = parser.add_argument
    add("--before", type=Path, required=True, metavar="TREE", help="root of the other tree")
    add("--size", type=at_least(1), default=224, metavar="S", help="default 224")
    add("--batch-size", type=at_least(1), default=64, help="default 64")
    add("--threads", type=at_least(1), default=2, help="default 2")
    args, about = begin(parser, argv)
    tree = args.before.resolve()
    if not (tree / "pipelines").is_dir():
        raise UserError(f"--before {args.before} is no tree of this project: name its root")
    task = (str(args.data.resolve()), args.size, args.batch_size, args.threads)
    rounds: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    with loader_there(tree, task) as there, loader_here(*task) as here:
        for number in range(args.rounds + 1):
            for name, turn in (("before", there), ("after", here)):
                found = turn(args.seconds if number else 0.1)
                if number:  # round 0: files into the page cache, buffers to their size
                    rounds[name].append(found)
                    told = "  ".join(f"{found[key]:.3f} {unit}" for key, unit in MEASURES.items())
                    print(f"round {number}  {name:6}  {told}", flush=True)
    rows = compare(rounds)
    names = ("before", "after", "ratio")
    table: list[tuple[str, ...]] = [("", *names)]
    table += [(MEASURES[row["measure"]], *(shown(row[name]) for name in names)) for row in rows]
    about["hardware"] += f", {args.threads} threads, {args.size} px"
    print(f"\n{about['hardware']} (95 % intervals)\n\n{markdown(table)}")
    if args.json is not None:
        write_object(args.json, about | {"measures": rows})
    return 0


if __name__ == "__main__":
    if SERVE in sys.argv[1:2]:
        serve(*sys.argv[2:])
    else:
        sys.exit(cli.exit_status(main, None))
