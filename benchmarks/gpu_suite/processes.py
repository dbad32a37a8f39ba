"""The processes in which the parts of the GPU suite run, each within its time."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from pipelines.signals import STOP_SIGNALS

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5
"""For a process that is told to end, before it is killed."""


class Worker:
    """One process for commands that run one after the other.

    It is replaced where it has ended, as it does after an error of CUDA, or had to be.
    """

    def __init__(self, compiled: Path) -> None:
        self._compiled = compiled
        """Where torch.compile keeps its code for all of them, unless the environment says."""
        self._child: subprocess.Popen[str] | None = None

    def run(self, words: list[str], log: Path, limit: float) -> int | None:
        """Run `python -m WORDS`; returns its exit status, None where it was ended at its limit."""
        deadline = time.monotonic() + limit
        status: int | None = None
        if self._child is not None and self._child.poll() is not None:
            self.end()  # by itself
        try:
            child = self._child or self._start(log)
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it has ended, and cannot be asked
                child.stdin.write(json.dumps([str(log), *words]) + "\n")
                child.stdin.flush()
            status = answer_of(child, deadline)
        finally:
            if status is None:
                self.end()
        return status

    def _start(self, log: Path) -> subprocess.Popen[str]:
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(self._compiled)} | os.environ
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOP_SIGNALS)
        # One of them in between would leave a child that nobody knows of.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with log.open("ab") as errors:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.gpu_suite.worker"],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,  # so that all of its processes can be ended
                    preexec_fn=unblock,
                )
        finally:
            unblock()
        return self._child

    def end(self) -> None:
        """End the process and all that it has started; pytest says first what has failed."""
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.close()  # there are no more commands
        for number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(child.pid, number)
                child.wait(GRACE_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        child.stdout.close()


def answer_of(child: subprocess.Popen[str], deadline: float) -> int | None:
    """Wait for the number that it says, or with which it ends; None where the time is up first.

    Its end shows in no pipe as long as a process lives that it has started.
    """
    assert child.stdout is not None
    while time.monotonic() < deadline:
        if child.poll() is not None:
            return child.returncode
        if select.select([child.stdout], [], [], 0.1)[0]:
            said = child.stdout.readline()
            return int(said) if said else child.wait()
    return None
