"""Checkpoints beside the training: copied at their step, then written by a thread."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastimagenet import checkpoint
from fastimagenet.recorder import Recorder


class CheckpointWriter:
    """Writes the states of a run to `folder`, one at a time, in their order.

    The training waits while its state is copied to main memory, and for the state before where
    that is not on the disk yet.
    """

    def __init__(self, folder: Path, recorder: Recorder) -> None:
        self._folder, self._recorder = folder, recorder
        for left in folder.glob(".*.pt.*"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._row: dict[str, Any] = {}
        """Of the event that would tell of a failure."""
        self._written: Future[bool] | None = None

    def save(self, state: dict[str, Any], names: Sequence[str] = ()) -> None:
        """Begin to leave the state as last.pt and under `names`."""
        self.finish()
        self._row = {"step": state["step"], "epoch": state["epoch"]}
        self._row["time_seconds"] = sum(state["clock"].values())
        self._written = self._thread.submit(self._write, copied(state), copying_done(), names)

    def _write(self, state: dict[str, Any], done: torch.cuda.Event | None, names: Any) -> bool:
        if done is not None:
            done.synchronize()
        save = partial(checkpoint.save_last, self._folder, state, names)
        return self._recorder.unwritten.attempt(f"checkpoint of step {state['step']}", save)

    def finish(self) -> bool:
        """Wait for what was begun; False where the disk has not taken it, which is an event.

        Then the earlier checkpoints are as they were.
        """
        written, self._written = self._written, None
        if written is None or written.result():
            return True
        message = f"checkpoint not written at step {self._row['step']}"
        self._recorder.event(**self._row, message=message)
        return False


def copied(value: Any) -> Any:
    """The same dicts, lists and plain values, with the tensors copied to main memory.

    From a GPU the copies are only begun: the stream does them before later updates.
    """
    if isinstance(value, Tensor):
        target = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return target.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        result = copy.copy(value)  # as it is: a model's has the versions of its layouts with it
        result.update((key, copied(item)) for key, item in value.items())
        return result
    return [copied(item) for item in value] if isinstance(value, list) else value


def copying_done() -> torch.cuda.Event | None:
    """On a GPU, what happens when the copies begun so far are there."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
