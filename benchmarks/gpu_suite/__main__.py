"""Everything that a GPU has to show, in one command of less than eight minutes, without network.

    python -m benchmarks.gpu_suite --data PHOTOGRAPHS --cifar10 CIFAR10 --output DIR

Ceilings of the device, the tests of tests/gpu, CIFAR-10 time to accuracy, the LR finder, stall of
the recipe `imagenet` phase by phase, DALI's decoding with its settings swept, the training step of
ResNet-50 by size, variant and batch, peak memory. Each part is a process of its own with a time
limit; one that fails is reported, the others follow, and the exit status is 1. DIR gets a dated
JSON, a table in Markdown and a page of plots, rewritten after every part, and a folder for each.

On a CPU the same commands run at tiny sizes. That is a rehearsal, and marked as one everywhere.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.measuring import begin, command_parser
from benchmarks.gpu_suite.parts import PARTS, Part, Setup
from benchmarks.gpu_suite.report import REHEARSAL, PartResult, Result, write_results
from benchmarks.research.window_decoding import failure
from fastimagenet import cli
from fastimagenet.distributed.world import Launch
from pipelines.cli import output_folder
from pipelines.datasets.folders import find_split
from pipelines.errors import UserError
from pipelines.loader import WHOLE_IMAGES
from pipelines.signals import STOP_SIGNALS

ROOT = Path(__file__).resolve().parents[2]
NAMES = tuple(part.name for part in PARTS)
REHEARSAL_TIMES = 10
"""What a part is given on a CPU that others may be using, in place of what it has on a GPU."""
TAIL_LINES = 40
GRACE_SECONDS = 5
"""For a part that is told to end, before it is killed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__)
    cli.add_device_flag(parser)
    add = parser.add_argument
    add("--output", type=output_folder, required=True, metavar="DIR", help="a new folder")
    help_text = "full-size photographs: DIR/train/CLASS/*, DIR/val/CLASS/* (may be the same ones)"
    add("--data", type=Path, metavar="DIR", help=help_text)
    add("--cifar10", type=Path, metavar="DIR", help="as pipelines.prepare cifar10 leaves it")
    some = f"some of {', '.join(NAMES)}"
    add("--only", nargs="+", choices=NAMES, default=NAMES, metavar="PART", help=some)
    add("--skip", nargs="+", choices=NAMES, default=(), metavar="PART")
    args, about = begin(parser, argv)
    setup = make_setup(args)
    if not setup.small:
        about["hardware"] = f"1 x {gpu_name()}, {about['hardware']}"
    folder, data = args.output.resolve(), {"data": setup.data, "cifar10": setup.cifar10}
    result = Result(
        **about,
        device=setup.device,
        rehearsal=REHEARSAL if setup.small else "",
        data={name: path and path.name for name, path in data.items()},
        parts={},
    )
    print(result.rehearsal or result.hardware, flush=True)
    if not setup.small and setup.data is not None and (told := failure(setup.data)):
        print(f"DALI does not decode windows here ({told}): all parts decode whole images")
        os.environ[WHOLE_IMAGES] = "1"
    shown = run_parts(setup, result, folder, set(args.only) - set(args.skip))
    print(f"results: {folder / result.name}.json, .md and .html")
    if result.failed:
        print(f"failed: {', '.join(result.failed)}", file=sys.stderr)
    return 1 if result.failed or not shown else 0


def run_parts(setup: Setup, result: Result, folder: Path, wanted: set[str]) -> bool:
    """Run the parts one after the other; returns whether tables and page could be made."""
    given, shown, start = 0, True, time.monotonic()
    for part in PARTS:
        given += part.seconds * (REHEARSAL_TIMES if setup.small else 1)
        if part.name not in wanted:
            found = PartResult(title=part.title, status="skipped", reason="not asked for")
        elif part.needs and getattr(setup, part.needs) is None:
            reason = f"needs --{part.needs}"
            found = PartResult(title=part.title, status="skipped", reason=reason)
        else:
            limit = given - (time.monotonic() - start)
            print(f"{part.name}: at most {limit:.0f} s", flush=True)
            found = run_part(part, setup, folder / part.name, limit, result.hardware)
            print(f"  {found.status} after {found.seconds:.0f} s  {found.reason}", flush=True)
        result.parts[part.name] = found
        shown = write_all(result, folder)
    return shown


def write_all(result: Result, folder: Path) -> bool:
    """Write all results; returns whether tables and page could be made of the figures."""
    try:
        write_results(result, folder)
    except Exception as error:  # nothing that is drawn is worth the time on the GPU
        print(f"no tables or page: {error!r}", file=sys.stderr)
        return False
    return True


def make_setup(args: argparse.Namespace) -> Setup:
    """Check what the flags ask for before anything runs. Raises UserError."""
    if (args.output / NAMES[0]).exists() or list(args.output.glob("*gpu-suite*.json")):
        raise UserError(f"--output {args.output} holds another suite: name another folder")
    for root in filter(None, (args.data, args.cifar10)):
        for split in ("train", "val"):
            find_split(root, split)
    data, cifar10 = (path and path.resolve() for path in (args.data, args.cifar10))
    return Setup(device=Launch(1, 1, args.device).resolved().device, data=data, cifar10=cifar10)


def gpu_name() -> str:
    """Return the driver's name of the first GPU; without torch, whose first call of it would keep
    memory there for as long as the suite runs. "" without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return ""
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode()


def run_part(part: Part, setup: Setup, folder: Path, limit: float, hardware: str) -> PartResult:
    """Run a part for `limit` seconds at most and take what it has left, whatever became of it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = ["-m", *part.command(setup, folder, limit)]
    log, start = folder / "log.txt", time.monotonic()
    status = run(words, log, limit)
    seconds = time.monotonic() - start
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    figures, reason = {}, ""
    try:
        figures = part.read(folder)
    except (UserError, KeyError, TypeError) as error:
        reason = f"what it left cannot be read: {error!r}"
    if status is None:
        reason = f"not done within {limit:.0f} s"
    elif status:
        last = next((line.strip() for line in lines[::-1] if line.strip()), "it said nothing")
        reason = f"exit status {status}: {last[:300]}"
    elif not figures:
        reason = reason or "it left no figures"
    return PartResult(
        title=part.title,
        status="failed" if reason else "done",
        device=hardware,
        rehearsal=setup.small,
        command=shlex.join(["python", *words]),
        seconds=round(seconds, 1),
        limit_seconds=round(limit, 1),
        reason=reason,
        log_tail="\n".join(lines[-TAIL_LINES:]) if reason else "",
        figures=figures,
    )


def run(words: list[str], log: Path, limit: float) -> int | None:
    """Run `python WORDS`; returns its exit status, None where it was ended at its limit."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOP_SIGNALS)
    with log.open("wb") as output:
        # One of them in between would leave a child that nobody knows of.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        child = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all of its processes can be ended
            preexec_fn=unblock,
        )
        try:
            unblock()
            return child.wait(max(limit, 1.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """End what is left of a part's processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(GRACE_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
