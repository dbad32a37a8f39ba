"""The commands as the tests type them: in this process, or in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from fastimagenet import cli
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from tests.forked import Forked

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--recipe", "tests/small.toml", "--device", "cpu"]
TWO = [*SMALL, "--nproc-per-node", 2, "--checkpoint-steps", 3]
SEVERAL = ("--nproc-per-node", "--nodes")
"""Flags with which torch's elastic agent takes over signals: not in the process of the tests."""


def start(module: str, *arguments: object) -> Forked:
    """Start `python -m module arguments`, everything imported."""
    return Forked(module, *arguments, cwd=ROOT)


def start_afresh(module: str, *arguments: object) -> subprocess.Popen[str]:
    """Start `python -m module arguments` as a user does."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(module: str, *arguments: object, status: int = 0) -> tuple[str, str]:
    """Standard output and error of a command that ends with `status`, in a process of its own."""
    process = (start_afresh if module == "torch.distributed.run" else start)(module, *arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def call(module: str, *arguments: object, cwd: Path = ROOT) -> int:
    """Run `python -m module arguments` in this process, which has torch imported already.

    Returns its exit status; what it prints is printed here.
    """
    spec = find_spec(module)
    name = f"{module}.__main__" if spec and spec.submodule_search_locations else module
    threads = torch.get_num_threads()
    # Freed memory would stay with this process for the tests to come.
    with contextlib.chdir(cwd), patch.object(cli, "keep_freed_memory"):
        try:
            return cli.exit_status(import_module(name).main, list(map(str, arguments)))
        finally:
            torch.set_num_threads(threads)


def output_of(module: str, *arguments: object, status: int = 0) -> tuple[str, str]:
    """Standard output and error of a command that ends with `status`, in this process if it can."""
    if any(flag in arguments for flag in SEVERAL):
        return run(module, *arguments, status=status)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ended = call(module, *arguments)
    assert ended == status, f"status {ended}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def train(*arguments: object, status: int = 0) -> tuple[str, str]:
    return output_of("fastimagenet.train", *arguments, status=status)


def evaluate(*arguments: object, status: int = 0) -> tuple[str, str]:
    return output_of("fastimagenet.evaluate", *arguments, status=status)


class Child:
    """A stand-in for the subprocess.Popen of `[python, "-m", module, ...]`."""

    pid = 0

    def __init__(self, command: Sequence[str], **_: Any) -> None:
        self.words = command[1:]

    def wait(self) -> int:
        """Run the command, as a whole."""
        assert self.words[0] == "-m"
        return call(*self.words[1:])

    def terminate(self) -> None:
        """It is never running when it could be asked to stop."""


CHILDREN = SimpleNamespace(Popen=Child)
"""For one module's `subprocess`: others, such as matplotlib, which looks for fonts, keep theirs."""


def error_of(*arguments: object) -> str:
    """The one line on standard error of a training that the user got wrong."""
    _, err = train(*arguments, status=2)
    # DALI's decoder says in a line of its own, which cannot be turned off, that it failed.
    lines = [line for line in err.splitlines() if "[ERROR]" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def stop_soon(*arguments: Any, after: str = "") -> str:
    """Standard output of a training that gets SIGTERM after its first row and ends with 143.

    `after`: once it has also saved a checkpoint of that name.
    """
    folder = arguments[arguments.index("--output") + 1]
    if not any(flag in arguments for flag in SEVERAL):
        kill = threading.Thread(target=kill_at_first_row, args=(folder, os.getpid(), after))
        kill.start()
        out, _ = train(*arguments, status=143)
        kill.join()
        return out
    process = start("fastimagenet.train", *arguments)
    kill_at_first_row(folder, process.pid, after)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    return out


def kill_at_first_row(folder: Path, process: int, after: str = "") -> None:
    deadline, saved = time.monotonic() + 300, folder / "checkpoints" / after
    while not (losses_of(folder) and saved.exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process, signal.SIGTERM)


def free_endpoint() -> str:
    """Where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows_of("step", read_rows(folder))]
