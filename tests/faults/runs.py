"""One run of the campaign of faults: its commands on two hosts, and what befalls them."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastimagenet.report.run import rows_of
from fastimagenet.training import checkpoint
from fastimagenet.training.recorder import read_rows
from pipelines.errors import UserError
from tests.faults.hosts import Hosts

KINDS = (
    "SIGKILL worker",
    "SIGKILL agent",
    "SIGTERM agent",
    "link cut",
    "checkpoint truncated",
    "checkpoint bit-flipped",
    "disk full",
)
CUT_SECONDS = 6
DISK_MIB = 160
LIMIT_SECONDS = 600
"""A run that takes longer hangs."""
MAX_COMMANDS = 5
FLAGS = (
    *("--recipe", "tests/faults/faults.toml", "--device", "cpu", "--nproc-per-node", "1"),
    *("--nodes", "2", "--checkpoint-steps", "5", "--timeout", "5"),
)


@dataclass
class Outcome:
    """One run."""

    kind: str
    host: int
    after_step: int
    """0: in the start-up, after_seconds from the command on."""
    after_seconds: float
    """After the row of that step."""
    seconds: float = 0.0
    commands: list[list[int]] = field(default_factory=lambda: [[], []])
    """Exit statuses on each host."""
    saved: int = 0
    """Step of the newest intact checkpoint when it came about, 0 without one."""
    done: int = 0
    """Steps done until then: the last one that a row or a process that lost the other names."""
    starts: int = 1
    """How often the processes began to train."""
    resumed_at: list[int] = field(default_factory=list)
    """Steps at which the training resumed."""
    identical: bool = False

    @property
    def first_step(self) -> int:
        """The step from which the run continued after the fault: 0 where it began anew."""
        if self.resumed_at:
            return self.resumed_at[0]
        return 0 if self.starts > 1 else self.done

    @property
    def repeated(self) -> int:
        """Steps that were done twice."""
        return max(0, self.done - self.first_step)

    @property
    def harmless(self) -> bool:
        """Whether the result is the undisturbed one, with no step repeated that was saved."""
        return self.identical and self.first_step >= self.saved


def is_worker(process: int) -> bool:
    """Whether a launcher has started this process."""
    return b"\0RANK=" in Path(f"/proc/{process}/environ").read_bytes()


class Run:
    """The commands of one run on both hosts."""

    def __init__(self, network: Hosts, data: Path, output: Path) -> None:
        self.network, self.output = network, output
        endpoint = f"{network.address(0)}:29400"
        self.flags = [*FLAGS, "--data", data, "--output", output, "--rdzv-endpoint", endpoint]
        self.statuses: list[list[int]] = [[], []]
        self.started = [0, 0]
        self.done = 0
        self.commands = [self._type(host) for host in range(2)]

    def _type(self, host: int) -> subprocess.Popen[str]:
        more = ["--resume", "auto"] if self.started[host] else []
        self.started[host] += 1
        log = (self.output.parent / f"{self.output.name}-{host}.log").open("a")
        with log:
            return self.network.start(host, "fastimagenet.train", *self.flags, *more, log=log)

    @property
    def said(self) -> str:
        """What both hosts have printed."""
        logs = sorted(self.output.parent.glob(f"{self.output.name}-*.log"))
        return "".join(log.read_text(errors="replace") for log in logs)

    def worker(self, host: int) -> int | None:
        """The process that trains on a host, if there is one now."""
        agent = self.commands[host].pid
        try:
            children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
            for child in map(int, children):
                if is_worker(child):
                    return child
        except OSError:  # it has just ended
            pass
        return None

    @property
    def step(self) -> int:
        """Of the last row."""
        return max((row["step"] for row in read_rows(self.output)), default=0)

    @property
    def resumed_at(self) -> list[int]:
        """Steps at which the training resumed, as the events have them."""
        events = rows_of("event", read_rows(self.output))
        return [row["step"] for row in events if row["message"].startswith("resumed")]

    @property
    def starts(self) -> int:
        """How often the processes began to train: each time the plan is printed."""
        return self.said.count("training images, world size")

    def watch(self) -> None:
        """Record the steps that are done, until processes begin again."""
        if self.starts < 2:
            named = re.findall(r"error: rank \d, in .* step (\d+):", self.said)
            self.done = max([self.done, self.step, *map(int, named)])

    def finish(self) -> None:
        """Wait for the training's end; a command that ends before it is started again."""
        deadline = time.monotonic() + LIMIT_SECONDS
        over = False
        while not over and time.monotonic() < deadline:
            time.sleep(0.05)
            self.watch()
            for host, command in enumerate(self.commands):
                if command.poll() is None or over:
                    continue
                self.statuses[host].append(command.returncode)
                over = command.returncode in (0, 1) and (self.output / "summary.json").exists()
                over = over or len(self.statuses[host]) > MAX_COMMANDS
                if not over:
                    self.commands[host] = self._type(host)
        for host, command in enumerate(self.commands):
            try:
                command.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                command.kill()
            if len(self.statuses[host]) < self.started[host]:
                self.statuses[host].append(command.wait())


def wait(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until it holds, or the time is over."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


def strike(outcome: Outcome, run: Run, generator: random.Random) -> None:
    """Bring the fault about."""
    host, folder = outcome.host, run.output / "checkpoints"
    wait(lambda: run.step >= outcome.after_step)
    time.sleep(outcome.after_seconds)
    damages = outcome.kind.startswith("checkpoint")
    outcome.saved = step_of(folder / (checkpoint.PREVIOUS if damages else checkpoint.LAST))
    outcome.done = max(run.step, outcome.saved)
    agent = run.commands[host]
    if outcome.kind == "SIGTERM agent":
        agent.terminate()
    elif outcome.kind == "SIGKILL agent":
        agent.kill()
    elif outcome.kind == "link cut":
        run.network.link(host, "down")
        time.sleep(CUT_SECONDS)
        run.network.link(host, "up")
    elif outcome.kind == "disk full":
        fill_for_a_while(run)
    else:
        if damages:
            damage(folder / checkpoint.LAST, outcome.kind, generator)
        if worker := run.worker(host):
            kill(worker)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint; 0 where there is none."""
    return int(checkpoint.load(path)["step"]) if path.exists() else 0


def kill(process: int) -> None:
    """Kill a process, which may have ended before."""
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", str(process)], capture_output=True)


def damage(path: Path, kind: str, generator: random.Random) -> None:
    """Truncate the file, or flip a bit of it, in place."""
    size, share = path.stat().st_size, generator.random()
    with path.open("r+b") as file:
        if kind.endswith("truncated"):
            file.truncate(int(size * share))
            return
        file.seek(int(size * share))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1 << generator.randrange(8)]))


def fill_for_a_while(run: Run) -> None:
    """Fill the disk until a checkpoint could not be written, or the run has ended."""
    filler = run.output.parent / "filler"
    with filler.open("ab", buffering=0) as file:

        def fill() -> bool:
            try:
                while file.write(bytes(1 << 16)):
                    pass
            except OSError:
                pass
            return "could not be written" in run.said or run.commands[0].poll() is not None

        wait(fill)
    filler.unlink()


@contextmanager
def disk() -> Iterator[Path]:
    """Mount a file system of its own, in memory."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", folder]
        result = subprocess.run(mount, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"a file system in memory cannot be mounted: {result.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)
