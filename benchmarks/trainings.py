"""Trainings as processes of their own: what is finished stays, what was stopped goes on."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from fastimagenet.recipes.plan import Plan
from pipelines.errors import UserError
from pipelines.files import read_object


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run with one seed, in its own folder."""

    run: str
    seed: int
    plan: Plan
    folder: Path
    flags: list[str]
    """Of `python -m fastimagenet.train`."""

    @property
    def finished(self) -> bool:
        """Whether all of it is there."""
        return (self.folder / "summary.json").exists()


def check_folder(training: Training, data: str) -> None:
    """Raise UserError if the folder holds a run of another recipe or of other data."""
    path = training.folder / "plan.json"
    if not path.exists():
        return
    found = read_object(path)
    wanted = json.loads(json.dumps(training.plan.to_dict() | {"data": data}))
    facts = ("data", "num_train", "world_size")
    other = [name for name in facts if found.get(name) != wanted[name]]
    recipe = found.get("recipe", {})
    other += [f"recipe field {k}" for k, v in wanted["recipe"].items() if recipe.get(k) != v]
    if other:
        raise UserError(
            f"--output: {training.folder} holds a run with another {', '.join(other)}: give the "
            "--data, --set, --epochs and --precision that it began with, or name another folder"
        )


def train_all(
    trainings: list[Training],
    around: Callable[[Training], AbstractContextManager[None]] = lambda _: nullcontext(),
    failed: list[Training] | None = None,
) -> int:
    """Train what is not finished, one after the other, until one fails or a signal comes.

    SIGTERM, Ctrl-C and a closed terminal make the training save and leave. `around` is entered
    before each training and left after it. With a list for those that `failed`, they are put there
    and the next one is trained. Returns the exit status.
    """
    stopped_by: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, _frame: object) -> None:
        stopped_by.append(number)
        if child is not None:
            child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    for training in trainings:
        title = f"run {training.run}, seed {training.seed}"
        if training.finished:
            print(f"{title}: finished before, in {training.folder}", flush=True)
            continue
        command = ["-m", "fastimagenet.train", *training.flags]
        print(f"\n{title}: {shlex.join(['python', *command])}", flush=True)
        with around(training):
            # In a session of its own: Ctrl-C reaches it by us alone, as SIGTERM, at any moment.
            child = subprocess.Popen([sys.executable, *command], start_new_session=True)
            if stopped_by:  # before there was a child to stop
                child.terminate()
            status = child.wait()
        if stopped_by:
            print(f"{title}: stopped; the same command goes on", flush=True)
            return 128 + stopped_by[0]
        if status:
            print(f"{title}: ended with status {status}", file=sys.stderr)
            if failed is None:
                return status if status > 0 else 128 - status
            failed.append(training)
    return 0
