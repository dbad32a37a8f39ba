"""Everything that a GPU has to show, in one command, the most telling first, without network.

    python -m benchmarks.gpu_suite --data PHOTOGRAPHS --cifar10 CIFAR10 --output DIR --limit 540

Facts and ceilings of the device, pixels of mixed decoding, ResNet-50's training step by size and
batch, DALI's decoding with its settings swept, stall, the step compiled and with CUDA graphs, quick
tests, CIFAR-10 time to accuracy, the LR finder, and tests that compile. Each part has a time limit,
the whole may have one. A part that fails is reported, the others follow in a new process, and the
exit status is 1. DIR gets a dated JSON, a table in Markdown and a page of plots, rewritten after
every part, and a folder for each.

On a CPU the same commands run at tiny sizes. That is a rehearsal, and marked as one everywhere.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common.measuring import begin, command_parser, process_seconds
from benchmarks.gpu_suite.parts import PARTS, Part, Setup
from benchmarks.gpu_suite.processes import GRACE_SECONDS, Worker
from benchmarks.gpu_suite.report import REHEARSAL, PartResult, Result, write_results
from benchmarks.research.window_decoding import failure
from fastimagenet import cli
from fastimagenet.distributed.world import Launch
from pipelines.cli import output_folder, positive
from pipelines.datasets.folders import find_split
from pipelines.errors import UserError
from pipelines.files import atomic_write
from pipelines.loader import WHOLE_IMAGES

NAMES = tuple(part.name for part in PARTS)
REHEARSAL_TIMES = 10
"""What a part is given on a CPU that others may be using, in place of what it has on a GPU."""
LEAST_SECONDS = 15
"""A part that would have less is not begun."""
TAIL_LINES = 40
LARGEST_BYTES = 1 << 20
"""Of a file of a part that is copied: no checkpoint is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    start = time.monotonic()
    if argv is None:  # imports count, and what `visit` has unpacked before it became this
        start -= process_seconds()
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
    add("--from", dest="first", choices=NAMES, default=NAMES[0], metavar="PART", help="and on")
    help_text = "of all, from the start of the process; default: the sum of the parts'"
    add("--limit", type=positive, metavar="SECONDS", help=help_text)
    help_text = "after every part, copies of the results and all small files, four in all, go here"
    add("--copy", type=output_folder, metavar="DIR", help=help_text)
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
    if not setup.small and setup.data is not None:
        setup = replace(setup, dali_fails=look_at_decoding(setup.data))
    wanted = set(args.only) & set(NAMES[NAMES.index(args.first) :]) - set(args.skip)
    deadline = start + (args.limit or float("inf"))
    shown = run_parts(setup, result, folder, wanted, deadline, args.copy)
    print(f"results: {folder / result.name}.json, .md and .html")
    if result.failed:
        print(f"failed: {', '.join(result.failed)}", file=sys.stderr)
    return 1 if result.failed or not shown else 0


def run_parts(
    setup: Setup,
    result: Result,
    folder: Path,
    wanted: set[str],
    deadline: float,
    copy: Path | None,
) -> bool:
    """Run the parts one after the other; returns whether tables and page could be made.

    `deadline`: of `time.monotonic`, at which the last process has ended.
    """
    until = time.monotonic()
    shared = Worker(folder / "compiled")
    try:
        for part in PARTS:
            reason = ""
            if part.name not in wanted:
                reason = "not asked for"
            elif part.needs and getattr(setup, part.needs) is None:
                reason = f"needs --{part.needs}"
            elif part.decodes and setup.dali_fails:
                reason = f"DALI decodes nothing here: {setup.dali_fails}"
            elif deadline - time.monotonic() < LEAST_SECONDS:
                reason = "no time left"
            if reason:
                skipped = PartResult(title=part.title, status="skipped", reason=reason)
                result.parts[part.name] = skipped
                continue
            until += part.seconds * (REHEARSAL_TIMES if setup.small else 1)
            limit = min(until, deadline - GRACE_SECONDS) - time.monotonic()
            print(f"{part.name}: at most {limit:.0f} s", flush=True)
            worker = Worker(folder / "compiled") if part.alone else shared
            found = run_part(part, setup, folder / part.name, limit, result.hardware, worker)
            if part.alone:
                worker.end()
            print(f"  {found.status} after {found.seconds:.0f} s  {found.reason}", flush=True)
            result.parts[part.name] = found
            write_all(result, folder, copy)
    finally:
        shared.end()
    return write_all(result, folder, copy)  # with what was skipped at last


def look_at_decoding(data: Path) -> str:
    """Have all parts decode whole images where windows fail; returns why DALI decodes nothing at
    all here, "" where it does."""
    windows = failure(data)
    os.environ[WHOLE_IMAGES] = "1" if windows else "0"
    if not windows:
        return ""
    print(f"DALI does not decode windows here ({windows}): all parts decode whole images")
    return failure(data, whole_images=True)


def write_all(result: Result, folder: Path, copy: Path | None) -> bool:
    """Write all results; returns whether tables and page could be made of the figures."""
    shown = True
    try:
        write_results(result, folder)
    except Exception as error:  # nothing that is drawn is worth the time on the GPU
        print(f"no tables or page: {error!r}", file=sys.stderr)
        shown = False
    if copy is not None:
        copy_results(result, folder, copy)
    return shown


def copy_results(result: Result, folder: Path, copy: Path) -> None:
    """Copy NAME.json, .md and .html, and all that the parts have left and is small, as one file:
    a call that is killed later keeps what it had."""
    for path in folder.glob(f"{result.name}.*"):
        with atomic_write(copy / path.name) as temporary:
            shutil.copyfile(path, temporary)
    with (
        atomic_write(copy / f"{result.name}-parts.tar.gz") as temporary,
        tarfile.open(temporary, "w:gz") as archive,
    ):
        for name in result.parts:
            for path in sorted((folder / name).rglob("*")):
                if path.is_file() and not path.is_symlink():
                    if path.stat().st_size <= LARGEST_BYTES:
                        archive.add(path, path.relative_to(folder))


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


def run_part(
    part: Part, setup: Setup, folder: Path, limit: float, hardware: str, worker: Worker
) -> PartResult:
    """Run a part for `limit` seconds at most and take what it has left, whatever became of it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = part.command(setup, folder, limit)
    log, start = folder / "log.txt", time.monotonic()
    log.touch()
    status = worker.run(words, log, limit)
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
        command=shlex.join(["python", "-m", *words]),
        seconds=round(seconds, 1),
        limit_seconds=round(limit, 1),
        reason=reason,
        log_tail="\n".join(lines[-TAIL_LINES:]) if reason else "",
        figures=figures,
    )


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
