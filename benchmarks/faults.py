"""Faults at random times, one a run: does every run end as if nothing had happened?

    python -m benchmarks.faults --faults 50 --json result.json

Two hosts, which are network namespaces joined by a bridge, train a small recipe over gloo by the
plain command, into a file system in memory. Each run meets one fault; a command that has ended
because of it is typed again on its host with --resume auto, as a cluster's scheduler would. The
run has to end with the weights, losses and figures of an undisturbed one, bit for bit. Kinds,
hosts and times follow from --seed (where exactly a time falls in the training does not). Needs
the rights to make network namespaces and to mount. Exit status 1: a run ended otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.hosts import Hosts, hosts, permitted
from fastimagenet import checkpoint, cli
from fastimagenet.files import read_rows, rows_of
from pipelines.environment import processor, versions
from pipelines.errors import UserError

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
    *("--recipe", "benchmarks/faults.toml", "--device", "cpu", "--nproc-per-node", "1"),
    *("--nodes", "2", "--checkpoint-steps", "5", "--timeout", "5"),
)


@dataclass
class Outcome:
    """One run."""

    kind: str
    host: int
    after_seconds: float
    """From the first checkpoint on for those that damage one, else from the command on."""
    seconds: float = 0.0
    commands: list[list[int]] = field(default_factory=lambda: [[], []])
    """Exit statuses on each host."""
    resumed_at: list[int] = field(default_factory=list)
    """Steps at which the training went on."""
    identical: bool = False


class Run:
    """The commands of one run on both hosts."""

    def __init__(self, network: Hosts, data: Path, output: Path) -> None:
        self.network, self.output = network, output
        endpoint = f"{network.address(0)}:29400"
        self.flags = [*FLAGS, "--data", data, "--output", output, "--rdzv-endpoint", endpoint]
        self.statuses: list[list[int]] = [[], []]
        self.typed = [0, 0]
        self.commands = [self._type(host) for host in range(2)]

    def _type(self, host: int) -> subprocess.Popen[str]:
        more = ["--resume", "auto"] if self.typed[host] else []
        self.typed[host] += 1
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
                if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes():
                    return child
        except OSError:  # it has just ended
            pass
        return None

    def finish(self) -> None:
        """Until the training is over, typing again what has ended before; then note the rest."""
        deadline = time.monotonic() + LIMIT_SECONDS
        over = False
        while not over and time.monotonic() < deadline:
            time.sleep(0.05)
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
            if len(self.statuses[host]) < self.typed[host]:
                self.statuses[host].append(command.wait())


def wait(condition: Callable[[], object], seconds: float = 120) -> None:
    """Until it holds, or the time is over."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


def strike(outcome: Outcome, run: Run, generator: random.Random) -> None:
    """Bring the fault about."""
    host, folder = outcome.host, run.output / "checkpoints"
    if outcome.kind.startswith(("checkpoint", "disk")):
        wait((folder / checkpoint.PREVIOUS).exists)
    time.sleep(outcome.after_seconds)
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
        if outcome.kind.startswith("checkpoint"):
            damage(folder / checkpoint.LAST, outcome.kind, generator)
        if worker := run.worker(host):
            kill(worker)


def kill(process: int) -> None:
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
    """Leave no space until a checkpoint could not be written, or the run has ended."""
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


def fingerprint(output: Path) -> str:
    """Of the final weights, the losses of all steps and the figures of all epochs."""
    state = checkpoint.load(output / "checkpoints" / checkpoint.LAST)
    digest = hashlib.sha256()
    for name, value in sorted(state["model"].items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    rows = read_rows(output)
    keys = ("step", "epoch", "loss", "lr", "train_loss", "val_loss", "top1", "top5")
    for row in (*rows_of("step", rows), *rows_of("epoch", rows)):
        digest.update(json.dumps([row.get(key) for key in keys]).encode())
    return digest.hexdigest()


@contextmanager
def disk() -> Iterator[Path]:
    """A folder that is a file system of its own, in memory."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", folder]
        result = subprocess.run(mount, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"a file system in memory cannot be mounted: {result.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def disturbed(outcome: Outcome, data: Path, expected: str, generator: random.Random) -> None:
    """A run with the fault; fills in how it ended."""
    with hosts(2) as network, disk() as folder:
        began = time.monotonic()
        run = Run(network, data, folder / "run")
        strike(outcome, run, generator)
        run.finish()
        outcome.seconds = time.monotonic() - began
        outcome.commands = run.statuses
        events = rows_of("event", read_rows(run.output))
        outcome.resumed_at = [r["step"] for r in events if r["message"].startswith("resumed")]
        try:
            outcome.identical = fingerprint(run.output) == expected
        except UserError:
            outcome.identical = False
        if not outcome.identical:
            print(run.said, file=sys.stderr)


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown, one row a fault."""
    lines = [
        "| # | fault | host | after | exit statuses, host 0; host 1 | went on at step | took "
        "| bit for bit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, o in enumerate(outcomes, 1):
        statuses = "; ".join(", ".join(map(str, one)) for one in o.commands)
        steps = ", ".join(map(str, o.resumed_at)) or "-"
        lines.append(
            f"| {number} | {o.kind} | {o.host} | {o.after_seconds:.1f} s | {statuses} | {steps} "
            f"| {o.seconds:.0f} s | {'yes' if o.identical else 'NO'} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; raises UserError where it is not permitted."""
    example = "python -m benchmarks.faults --faults 50 --json result.json"
    parser = cli.make_parser("benchmarks.faults", (__doc__ or "").splitlines()[0], example)
    add = parser.add_argument
    add("--faults", type=int, default=len(KINDS), metavar="N", help="runs; default one of a kind")
    add("--seed", type=int, default=0)
    add("--data", type=Path, metavar="DIR", help="image folder; default: the embedded digits")
    add("--json", type=Path, metavar="FILE", help="write the outcomes, too")
    args = parser.parse_args(argv)
    if args.faults < 1:
        raise UserError(f"--faults must be at least 1, not {args.faults}")
    if not permitted():
        raise UserError("network namespaces cannot be made here: run it as root")
    data, generator = cli.data_folder(args), random.Random(args.seed)
    undisturbed, expected = measured(data)
    print(f"undisturbed: {undisturbed:.0f} s, fingerprint {expected[:16]}", flush=True)
    outcomes: list[Outcome] = []
    for number in range(args.faults):
        kind = KINDS[number % len(KINDS)]
        longest = undisturbed * (0.3 if kind.startswith(("checkpoint", "disk")) else 0.9)
        outcome = Outcome(kind, generator.randrange(2), generator.uniform(0, longest))
        disturbed(outcome, data, expected, generator)
        outcomes.append(outcome)
        print(table([outcome]).splitlines()[-1], flush=True)
    print(table(outcomes))
    if args.json:
        args.json.write_text(json.dumps(report(args, undisturbed, outcomes), indent=2) + "\n")
    return 0 if all(outcome.identical for outcome in outcomes) else 1


def measured(data: Path) -> tuple[float, str]:
    """Seconds and fingerprint of the undisturbed run. Raises UserError where even that fails."""
    with hosts(2) as network, disk() as folder:
        began = time.monotonic()
        run = Run(network, data, folder / "run")
        run.finish()
        if run.statuses != [[0], [0]]:
            raise UserError(f"the undisturbed run ended with {run.statuses}: {run.said}")
        return time.monotonic() - began, fingerprint(run.output)


def report(
    args: argparse.Namespace, undisturbed: float, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """The campaign as plain values."""
    return {
        "seed": args.seed,
        "undisturbed_seconds": undisturbed,
        "identical": sum(outcome.identical for outcome in outcomes),
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "versions": versions(),
        "hardware": processor(),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
