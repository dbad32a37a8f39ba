"""Faults at random times, one a run: does every run end as if nothing had happened?

    python -m tests.faults --faults 50 --json result.json

Two hosts, which are network namespaces joined by a bridge, train a small recipe over gloo by the
plain command, into a file system in memory. Each run meets one fault; a command that has ended
because of it is restarted on its host with --resume auto, as a cluster's scheduler would. The run
has to end with the weights, losses and figures of an undisturbed one, bit for bit, and may
repeat no step that the last intact checkpoint had. Kinds, hosts and times follow from --seed (where
exactly a time falls in the training does not). Needs the rights to make network namespaces and to
mount. Exit status 1: a run ended otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from fastimagenet import cli
from fastimagenet.report.run import rows_of
from fastimagenet.training import checkpoint
from fastimagenet.training.recorder import read_rows
from pipelines.cli import at_least, make_parser, output_file
from pipelines.datasets.digits import digits_folder
from pipelines.environment import processor, versions
from pipelines.errors import UserError
from pipelines.files import write_object
from tests.faults.hosts import hosts, permitted
from tests.faults.runs import KINDS, Outcome, Run, disk, strike

LAST_STEP = 110
"""A row after which a fault still meets the training; the recipe has 137 steps."""
START_UP_SECONDS = 10
"""In which a fault meets the start-up, or on an idle machine the first steps."""


def fingerprint(output: Path) -> str:
    """Hash the final weights, the losses of all steps and the figures of all epochs."""
    state = checkpoint.load(output / "checkpoints" / checkpoint.LAST)
    digest = hashlib.sha256()
    for name, value in sorted(state["model"].items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    rows = read_rows(output)
    keys = ("step", "epoch", "loss", "lr", "train_loss", "val_loss", "top1", "top5")
    for row in (*rows_of("step", rows), *rows_of("epoch", rows)):
        digest.update(json.dumps([row.get(key) for key in keys]).encode())
    return digest.hexdigest()


def disturbed(outcome: Outcome, data: Path, expected: str, generator: random.Random) -> None:
    """Run with the fault, and fill in how the run ended."""
    with hosts(2) as network, disk() as folder:
        began = time.monotonic()
        run = Run(network, data, folder / "run")
        strike(outcome, run, generator)
        run.finish()
        outcome.seconds = time.monotonic() - began
        outcome.commands, outcome.resumed_at = run.statuses, run.resumed_at
        if (starts := run.starts) > 1:
            outcome.starts, outcome.done = starts, max([run.done, *run.resumed_at])
        try:
            outcome.identical = fingerprint(run.output) == expected
        except UserError:
            outcome.identical = False
        if not outcome.harmless:
            print(run.said, file=sys.stderr)


def table(outcomes: Sequence[Outcome]) -> str:
    """Format as Markdown, one row a fault."""
    lines = [
        "| # | fault | host | steps done | last checkpoint | resumed at | repeated "
        "| exit statuses, host 0; host 1 | took | bit for bit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, o in enumerate(outcomes, 1):
        statuses = "; ".join(", ".join(map(str, one)) for one in o.commands)
        steps = ", ".join(map(str, o.resumed_at)) or ("0" if o.starts > 1 else "-")
        repeated = f"{o.repeated}{'' if o.first_step >= o.saved else ' TOO MANY'}"
        lines.append(
            f"| {number} | {o.kind} | {o.host} | {o.done} | {o.saved} | {steps} | {repeated} "
            f"| {statuses} | {o.seconds:.0f} s | {'yes' if o.identical else 'NO'} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; raises UserError where it is not permitted."""
    example = "python -m tests.faults --faults 50 --json result.json"
    parser = make_parser("tests.faults", (__doc__ or "").splitlines()[0], example)
    add = parser.add_argument
    add("--faults", type=at_least(1), default=len(KINDS), metavar="N", help="default one of a kind")
    add("--seed", type=int, default=0)
    add("--data", type=Path, metavar="DIR", help="image folder; default: the embedded digits")
    add("--json", type=output_file, metavar="FILE", help="write the outcomes, too")
    args = parser.parse_args(argv)
    if not permitted():
        raise UserError("network namespaces cannot be made here: run it as root")
    data, generator = args.data or digits_folder(), random.Random(args.seed)
    undisturbed, expected = measured(data)
    print(f"undisturbed: {undisturbed:.0f} s, fingerprint {expected[:16]}", flush=True)
    outcomes: list[Outcome] = []
    for number in range(args.faults):
        outcome = drawn(KINDS[number % len(KINDS)], generator)
        disturbed(outcome, data, expected, generator)
        outcomes.append(outcome)
        print(table(outcomes).splitlines()[-1], flush=True)
        if args.json:
            write_object(args.json, report(args, undisturbed, outcomes))
    print(table(outcomes))
    return 0 if all(outcome.harmless for outcome in outcomes) else 1


def drawn(kind: str, generator: random.Random) -> Outcome:
    """Draw a fault; one in eight meets the start-up, except those that need two checkpoints."""
    host, early = generator.randrange(2), generator.random() < 1 / 8
    if early and not kind.startswith(("checkpoint", "disk")):
        return Outcome(kind, host, 0, generator.uniform(0, START_UP_SECONDS))
    return Outcome(kind, host, 10 * generator.randint(1, LAST_STEP // 10), generator.random() / 2)


def measured(data: Path) -> tuple[float, str]:
    """Return seconds and fingerprint of the undisturbed run. Raises UserError where it fails."""
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
    """Return the campaign as plain values."""
    return {
        "seed": args.seed,
        "undisturbed_seconds": undisturbed,
        "identical": sum(outcome.identical for outcome in outcomes),
        "harmless": sum(outcome.harmless for outcome in outcomes),
        "outcomes": [asdict(o) | {"repeated": o.repeated} for o in outcomes],
        "versions": versions(),
        "hardware": processor(),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
