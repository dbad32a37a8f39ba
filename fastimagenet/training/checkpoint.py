"""Checkpoints: written atomically, sealed by a checksum, read without running any code.

The checksum is the comment of the zip archive that `torch.save` writes, so that `torch.load` reads
the file as any other. torch itself overlooks flipped bits, and the archive's own CRC-32 does not
cover its directory, where one flipped bit makes torch read other memory as weights.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastimagenet.training.recorder import Recorder
from pipelines.errors import UserError
from pipelines.files import atomic_write

LAST, PREVIOUS, EPOCH, BEST = "last.pt", "previous.pt", "epoch.pt", "best.pt"
ENTRIES = (
    *("recipe", "classes", "num_train", "seed", "model", "ranks", "accumulation", "clock"),
    "saved_at",
)
"""What a checkpoint that a run resumes from holds at least."""
DIGEST = "sha256"
SEAL_SIZE = 64
"""Bytes of the digest as ASCII."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically. Raises OSError, such as for a full disk."""
    try:
        with atomic_write(path) as beside, beside.open("w+b") as file:
            torch.save(state, file)
            seal(file)
    except RuntimeError as error:
        # torch's zip writer hides the cause when it closes a file that is incomplete.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_last(folder: Path, state: dict[str, Any], names: Iterable[str] = ()) -> None:
    """Write `folder`/last.pt, keep the one before as previous.pt, and link the new one to `names`.

    last.pt is complete at any moment, and previous.pt is another file: wherever this is
    interrupted, one of the two is intact even if the last one had been damaged. Raises OSError, and
    then all files are as they were.
    """
    fresh, before = folder / f".{LAST}.new", folder / f".{PREVIOUS}.new"
    try:
        save(fresh, state)
        if (folder / LAST).exists():
            link(folder / LAST, before)
        fresh.replace(folder / LAST)
        if before.exists():
            before.replace(folder / PREVIOUS)
    finally:
        fresh.unlink(missing_ok=True)
        before.unlink(missing_ok=True)
    for name in names:
        beside = folder / f".{name}.new"
        try:
            link(folder / LAST, beside)
            beside.replace(folder / name)
        finally:
            beside.unlink(missing_ok=True)


def link(source: Path, path: Path) -> None:
    """Make `path` a hard link to the file, which is never written to again, or else a copy."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)


def seal(file: BinaryIO) -> None:
    """Append the digest of a zip archive without a comment as its comment."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    digest = digest_of(file, end - 2)
    file.seek(end - 2)  # the length of the comment
    file.write(SEAL_SIZE.to_bytes(2, "little") + digest)


def digest_of(file: BinaryIO, size: int) -> bytes:
    """Compute the digest of the first `size` bytes, as ASCII."""
    digest = hashlib.new(DIGEST)
    while size and (data := file.read(min(size, 1 << 20))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest().encode()


def check_seal(file: BinaryIO) -> None:
    """Raise ValueError unless the file ends with its digest; seek to its start."""
    end = file.seek(0, os.SEEK_END)
    body = max(0, end - SEAL_SIZE - 2)
    file.seek(0)
    digest = digest_of(file, body)
    if file.read() != SEAL_SIZE.to_bytes(2, "little") + digest:
        raise ValueError("it is truncated or altered (its checksum does not hold)")
    file.seek(0)


def weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint to evaluate: averaged where its run averages them."""
    if state["ema"] is None:
        return dict(state["model"])
    prefix = "module."
    return {
        name.removeprefix(prefix): value
        for name, value in state["ema"].items()
        if name.startswith(prefix)
    }


def load(path: Path, *entries: str) -> dict[str, Any]:
    """Load what `save` wrote onto the CPU, and check that it has these entries.

    Raises UserError naming the file if it is missing, damaged, hostile or of another program.
    """
    try:
        with path.open("rb") as file:
            check_seal(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except pickle.UnpicklingError:  # torch advises to load it all the same
        raise UserError(
            f"checkpoint {path} cannot be read, take another one: it holds more than tensors and "
            "plain values, which fastimagenet.train never writes and which may run code"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read, take another one: {reason}") from None
    missing = [name for name in entries if not isinstance(state, dict) or name not in state]
    if missing:
        raise UserError(
            f"checkpoint {path} was not written by fastimagenet.train: it has no {missing[0]}"
        )
    return dict(state)


def newest_intact(folder: Path, *, say: bool = True) -> tuple[Path, dict[str, Any]]:
    """Load last.pt or, where it is damaged, previous.pt or the one of the last epoch's end.

    `say`: note a damaged file on standard error. Raises UserError naming last.pt where none is
    intact.
    """
    damage: UserError | None = None
    for name in (LAST, PREVIOUS, EPOCH):
        path = folder / name
        try:
            state = load(path, *ENTRIES)
        except UserError as error:
            damage = damage or error
            continue
        if damage is not None and say:
            print(f"note: {damage}; resuming from {path}", file=sys.stderr)  # noqa: T201
        return path, state
    assert damage is not None
    raise damage


def adopt(folder: Path, path: Path, num_epochs: int) -> None:
    """Make the checkpoint that a run resumes from its last one: where it would start again.

    Into a new folder is linked the best one of the `num_epochs` epochs until then, too: the run's
    rows and its summary refer to both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last, beside = folder / LAST, folder / f".{LAST}.new"
    if not (last.exists() and path.samefile(last)):
        link(path, beside)
        beside.replace(last)
    if path.parent.resolve() == folder.resolve():
        return
    best = path.with_name(BEST)
    if best.exists() and load(best, "epoch")["epoch"] <= num_epochs:
        link(best, folder / BEST)


class CheckpointWriter:
    """Writes a run's checkpoints to `folder` on a thread, one at a time, in order.

    The training waits while its state is copied to main memory, and for the previous checkpoint
    if that is not on the disk yet.
    """

    def __init__(self, folder: Path, recorder: Recorder) -> None:
        self._folder, self._recorder = folder, recorder
        for left in folder.glob(".*.pt.*"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._row: dict[str, Any] = {}
        """Fields of the event that would report a failure."""
        self._written: Future[bool] | None = None

    def save(self, state: dict[str, Any], names: Sequence[str] = ()) -> None:
        """Begin to write the state to last.pt and under `names`."""
        self.finish()
        self._row = {"step": state["step"], "epoch": state["epoch"]}
        self._row["time_seconds"] = sum(state["clock"].values())
        self._written = self._thread.submit(self._write, copied(state), copying_done(), names)

    def _write(self, state: dict[str, Any], done: torch.cuda.Event | None, names: Any) -> bool:
        if done is not None:
            done.synchronize()
        save = partial(save_last, self._folder, state, names)
        return self._recorder.unwritten.attempt(f"checkpoint of step {state['step']}", save)

    def finish(self) -> bool:
        """Wait for the checkpoint begun last; False, and an event, if it could not be written.

        The earlier checkpoints are then as they were.
        """
        written, self._written = self._written, None
        if written is None or written.result():
            return True
        message = f"checkpoint not written at step {self._row['step']}"
        self._recorder.event(**self._row, message=message)
        return False


def copied(value: Any) -> Any:
    """Copy the tensors in nested dicts and lists to main memory, and return the same nesting.

    From a GPU the copies are only queued: the stream makes them before later updates.
    """
    if isinstance(value, Tensor):
        target = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return target.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        result = copy.copy(value)  # a model's state dict has the versions of its modules with it
        result.update((key, copied(item)) for key, item in value.items())
        return result
    return [copied(item) for item in value] if isinstance(value, list) else value


def copying_done() -> torch.cuda.Event | None:
    """Return, on a GPU, the event of the copies queued so far."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
