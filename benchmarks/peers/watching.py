"""Run a program that trains, and read its accuracies from what it prints by itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from pipelines.files import Row
from pipelines.formats import duration, percent
from pipelines.signals import Interrupted, stop_signals

GRACE_SECONDS = 30.0
"""How long a program may take to end, once asked."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What a program's output tells, line by line. The accuracy is that of the plain weights."""

    top1: re.Pattern[str]
    """An accuracy, group "top1"; with group "train" also the training clock in seconds."""
    whole: float
    """What it prints for all images."""
    evaluation: re.Pattern[str] | None = None
    """The last such line before an accuracy is where its evaluation began; None: not needed."""
    first_epoch: int = 0
    """Its number in the group "epoch" of either pattern; without one every epoch is evaluated."""


OURS = Reader(
    top1=re.compile(
        r"epoch +(?P<epoch>\d+) .*  train (?P<train>[\d.]+) s  top-1 (?P<top1>[\d.]+)%"
    ),
    whole=100,
    first_epoch=1,
)
READERS = {
    # Epoch, training loss, validation loss, accuracy, other metrics, time: a line for every epoch,
    # whose numbers begin anew with every call of fit.
    "fastai": Reader(
        top1=re.compile(r"\d+ +\S+ +\S+ +(?P<top1>[01]\.\d+) .*\d:\d\d *$"),
        whole=1,
        evaluation=re.compile(r"Epoch .*\| 0\.00% \["),  # a progress bar, the second of an epoch
    ),
    "timm": Reader(  # the last batch's line has the mean over all
        top1=re.compile(r"Test: \[ *(\d+)/\1\] .*Acc@1: +\S+ +\( *(?P<top1>[\d.]+)\)"),
        whole=100,
        evaluation=re.compile(r"Train: (?P<epoch>\d+)"),
    ),
    "torchvision": Reader(
        top1=re.compile(r"Test: +Acc@1 (?P<top1>[\d.]+)"),
        whole=100,
        evaluation=re.compile(r"Epoch: \[(?P<epoch>\d+)\] Total time"),
    ),
}
"""By the name of the package. The lines are those of fastai 2.8 (the table of a Learner whose first
metric is the accuracy), timm 1.0 (train.py) and torchvision 0.22 (references/classification)."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A command that trains, and how its output is read."""

    name: str
    words: list[str]
    reader: Reader
    packages: tuple[str, ...] = ()
    """Whose versions are told."""

    @property
    def command(self) -> str:
        """As it would be typed."""
        return shlex.join(self.words)

    def versions(self) -> dict[str, str]:
        """Ask the first word of the command that is a Python; {} where there is none."""
        python = next((word for word in self.words if Path(word).name.startswith("python")), None)
        if python is None or not self.packages:
            return {}
        code = (
            "import importlib.metadata as m, json, platform; "
            "print(json.dumps({'python': platform.python_version()} | {d.name: d.version "
            f"for d in m.distributions() if d.name in {self.packages}}}))"
        )
        told = subprocess.run([python, "-c", code], capture_output=True, text=True)
        return dict(json.loads(told.stdout)) if told.returncode == 0 else {}


def watch(one: Contestant, mark: float, limit: float | None, log: Path) -> Row:
    """Run a command and read its output, which goes to `log`.

    `limit`: it is ended at the first top-1 of `mark`, a fraction, or after so many seconds; None:
    it runs to its end. Raises Interrupted at a stop signal, once the command has ended.

    "outcome" is "reached", "missed" (it ended by itself), "limit" or "failed" (with an error, or
    without any accuracy). Times are seconds from the start of the process to the arrival of the
    line with the accuracy, "train_seconds" less the evaluations; those to `mark` may be None.
    "epochs" has a row for each accuracy, whose "epoch" counts from 1.
    """
    print(f"\n{one.name}: {one.command}", flush=True)
    row: Row = {"name": one.name, "command": one.command, "target": mark}
    row |= {"versions": one.versions(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    row |= {"outcome": "missed", "wall_seconds": None, "train_seconds": None, "epochs": []}
    lines: SimpleQueue[tuple[float, str] | None] = SimpleQueue()  # None: there are no more
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    evaluation, evaluating = 0.0, None  # seconds so far, and since when
    groups: dict[str, str] = {}
    by_itself = False
    with (
        stop_signals(lambda: lines.put(None)) as signals,
        log.open("w", buffering=1, encoding="utf-8") as file,  # line by line, to be followed
    ):
        child = subprocess.Popen(
            one.words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches it by us alone, and its workers with it
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # lines arrive as they are printed
        )
        Thread(target=pass_on, args=(child, lines), daemon=True).start()
        while limit is None or row["outcome"] != "reached":
            left = None if limit is None else max(0.0, began + limit - time.perf_counter())
            try:
                item = lines.get(timeout=left)
            except Empty:
                row["outcome"] = "limit"
                break
            if item is None:
                by_itself = signals.number is None
                break
            now, line = item[0] - began, item[1]
            file.write(line)
            if one.reader.evaluation and (told := one.reader.evaluation.match(line)):
                evaluating, groups = now, told.groupdict()
            if (told := one.reader.top1.match(line)) is None:
                continue
            evaluation += 0.0 if evaluating is None else now - evaluating
            evaluating = None
            groups |= told.groupdict()
            train = float(groups["train"]) if "train" in groups else now - evaluation
            top1 = float(groups["top1"]) / one.reader.whole
            epoch = int(groups.get("epoch", len(row["epochs"]))) + 1 - one.reader.first_epoch
            seconds = {"wall_seconds": now, "train_seconds": train}
            row["epochs"].append({"epoch": epoch, "top1": top1} | seconds)
            print(f"{one.name}: {percent(top1)} after {duration(now)}", flush=True)
            if top1 >= mark and row["outcome"] != "reached":
                row |= {"outcome": "reached"} | seconds
        row["seconds"] = time.perf_counter() - began
        status = end(child, by_itself)
    if signals.number:
        print(f"{one.name}: stopped; the same command begins it anew", flush=True)
        raise Interrupted(signals.number)
    if by_itself and (status or not row["epochs"]):
        row |= {"outcome": "failed", "wall_seconds": None, "train_seconds": None}
        what = f"ended with status {status}" if status else "printed no accuracy that is known"
        print(f"{one.name}: {what}, see {log}", file=sys.stderr)
    return row


def pass_on(child: subprocess.Popen[str], lines: SimpleQueue[tuple[float, str] | None]) -> None:
    """Put every line with the time of its arrival; a carriage return ends one, too."""
    assert child.stdout is not None
    for line in child.stdout:
        lines.put((time.perf_counter(), line))
    lines.put(None)


def end(child: subprocess.Popen[str], by_itself: bool) -> int:
    """Wait for a process that ends `by_itself`, or ask it and its group to; return its status."""

    def tell(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    if not by_itself:
        tell(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    tell(signal.SIGKILL)  # what is left of it
    return child.wait()
