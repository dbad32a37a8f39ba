"""The folder of a run: taken by one run alone, and locked until the run's end."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType

from fastimagenet.config import RunConfig
from fastimagenet.distributed.collectives import gather_objects
from fastimagenet.distributed.processes import Processes
from fastimagenet.distributed.world import World, restarted, run_id, started_by_us
from pipelines.errors import UserError
from pipelines.files import read_object
from pipelines.limits import named_limits

LOCK = ".lock"
"""A file in the folder that says who writes there, locked by it."""


class RunFolder:
    """The folder of the run that `config` asks for; a context manager, which gives it back.

    It is taken and locked by the launcher of one node or by the only process; of several nodes, and
    under another launcher, by rank 0. What is given back without any file is removed. `prefix`:
    of a default name.
    """

    def __init__(self, config: RunConfig, prefix: str = "") -> None:
        self._config, self._prefix = config, prefix
        self.path: Path | None = None
        """None until it has been taken."""
        self._lock: int | None = None
        self._made: list[Path] = []
        self.is_own = False
        """Whether this very run, before it was restarted, has written there."""

    def take_for(self, processes: Processes) -> list[str]:
        """Take it where all processes of the run are to come from this one.

        Returns the flags that tell them of a folder that was not asked for.
        Raises UserError where it holds another run, or another process works on it.
        """
        if not processes.is_whole:
            return []
        self.take()
        return [] if self._config.output is not None else ["--output", str(self.path)]

    def take(self) -> None:
        """Choose the folder, make it and lock it.

        Raises UserError where it holds another run, or another process works on it.
        """
        config = self._config.with_output(self._prefix)
        resuming = config.resumes_here
        if started_by_us() and config.launch.nodes == 1:  # our launcher has it
            self.path, self.is_own = config.folder, is_own(config.folder)
            return
        if self._config.output is None and config.resume is None:
            self.path, self._made = new_folder(config.folder)
        else:
            check_is_folder(config.folder)
            self._made = missing(config.folder)
            config.folder.mkdir(parents=True, exist_ok=True)
            self.path = config.folder
        self._lock = lock(self.path)
        self.is_own = is_own(self.path)
        check_output(self.path, resuming or self.is_own)

    def shared(self, world: World) -> RunConfig:
        """Return the config with the folder, which rank 0 takes where nobody has yet.

        Every process has to call it. Raises UserError on all of them.
        """
        refused = ""
        if world.is_main and self.path is None:
            try:
                with named_limits():
                    self.take()
            except UserError as error:
                refused = str(error)
        found = gather_objects((self.path, self.is_own, refused), world, "the choice of the folder")
        self.path, self.is_own, refused = found[0]
        if refused:
            raise UserError(refused)
        return replace(self._config, output=self.path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None and self.path is not None:
            with suppress(OSError):
                (self.path / LOCK).unlink()
            os.close(self._lock)
        remove_empty(self._made)


def new_folder(path: Path) -> tuple[Path, list[Path]]:
    """Make a folder of that name or, where there is one, NAME-2, NAME-3 and so on.

    Returns it and what was made for it, the deepest first; nothing where it is that of this very
    run, restarted.
    """
    for number in count(1):
        each = path if number == 1 else path.with_name(f"{path.name}-{number}")
        made = missing(each)
        try:
            each.mkdir(parents=True)
            return each, made
        except FileExistsError:
            if is_own(each):
                return each, []
    raise AssertionError


def missing(path: Path) -> list[Path]:
    """List the folder and its parents as far as they are not there, the deepest first."""
    return [each for each in (path, *path.parents) if not each.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove these folders, the deepest first, up to one that holds anything."""
    with suppress(OSError):
        for each in folders:
            each.rmdir()


@contextmanager
def result_folder(config: RunConfig, prefix: str) -> Iterator[RunConfig]:
    """Choose the folder of a benchmark's results: a new one, unless one was asked for.

    A new one is removed again where nothing was written to it.
    """
    if config.output is not None:
        yield config
        return
    path, made = new_folder(config.with_output(prefix).folder)
    try:
        yield replace(config, output=path)
    finally:
        remove_empty(made)


def is_own(folder: Path) -> bool:
    """Tell whether this run, before it was restarted, has written the folder's plan.json."""
    plan, own = folder / "plan.json", run_id()
    if own is None:  # other launchers have no name for a run
        return restarted() and plan.exists()
    try:
        return read_object(plan).get("run") == own
    except UserError:  # there is none, or one that was damaged: not by this run
        return False


def check_is_folder(path: Path) -> None:
    """Raise UserError if it is a file."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file: name a folder")


def check_output(folder: Path, resuming: bool = False) -> None:
    """Raise UserError if the folder cannot take this run, which, resumed, may find itself there."""
    from fastimagenet.training.checkpoint import LAST

    check_is_folder(folder)
    last = folder / "checkpoints" / LAST
    results = [name for name in ("summary.json", "lr_find.json") if (folder / name).exists()]
    if results and not last.exists():
        raise UserError(
            f"--output {folder} holds another run's {results[0]} and no checkpoint to resume from: "
            "name another folder"
        )
    if not resuming and ((folder / "plan.json").exists() or last.exists()):
        raise UserError(
            f"--output {folder} holds another run: name another folder, "
            "or resume a stopped training by train --resume auto"
        )


def lock(folder: Path) -> int | None:
    """Lock the folder for this process; returns the file descriptor that holds the lock.

    None, with a note for the user, where the file system knows no locks.
    Raises UserError that says who holds it.
    """
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another run"
            os.close(descriptor)
            raise UserError(
                f"--output {folder} is in use by {holder}: wait for its end, or name another folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            reason = f"its file system knows no locks ({error.strerror})"
            print(f"note: let no other run write to {folder}: {reason}", file=sys.stderr)  # noqa: T201
            return None
        with suppress(FileNotFoundError):  # another process has just given it back
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
    with suppress(OSError):  # a full disk, as whatever is written next says
        os.truncate(descriptor, 0)  # what a killed process has left
        os.write(descriptor, holder.encode())
    return descriptor
