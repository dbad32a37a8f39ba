"""Commands in processes of their own that begin with everything imported.

A fresh interpreter takes six seconds of a core until it trains, nearly all of them for imports.
These processes are forked from the server that also starts the loaders' workers; the processes
that a launcher starts are forked from the launcher. `tests.commands.start_afresh` runs the real
interpreter.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pipelines.signals import STOP_SIGNALS
from pipelines.workers import PRELOADED, hidden_main

IMPORTED = (
    PRELOADED,
    "fastimagenet.train",
    "fastimagenet.evaluate",
    "fastimagenet.lr_find",
    "fastimagenet.training.trainer",
    "fastimagenet.lr_finder.finder",
    "fastimagenet.report.summary",
    "fastimagenet.distributed.launch",
    "tests.forked",
)
"""Not DALI: with its libraries a process fills nearly the 4 GiB that a scan's workers get."""
CLONE_NEWNET = 0x40000000
"""From <linux/sched.h>."""
RANK_NAME = "rank "
"""A started process is called "rank 1": its /proc/PID/environ is that of the server."""


def preload() -> None:
    """Start the server, which imports in the background."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    forkserver.ensure_running()


class Output:
    """A file descriptor that a process gets as it is started.

    A DupFd made before that would stay open here if the process ended before it fetched it.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return received, (DupFd(self.number),)


def received(output: Any) -> int:
    """Return the number that the descriptor has in the new process."""
    number: int = output.detach()
    return number


class Forked:
    """What the tests use of a subprocess.Popen, text in pipes, for `python -m module words`.

    `network`: name of the network namespace to run in. `log`: a file for its output, instead.
    `patches`: values by the full name of what they replace, in the command's own process.
    """

    def __init__(
        self,
        module: str,
        *words: object,
        cwd: Path,
        network: str | None = None,
        log: TextIO | None = None,
        patches: dict[str, object] | None = None,
    ) -> None:
        pipes = os.pipe(), os.pipe()
        self.stdout, self.stderr = (os.fdopen(read, errors="replace") for read, _ in pipes)
        outputs = [log.fileno()] * 2 if log else [write for _, write in pipes]
        arguments = (
            [module, *map(str, words)],
            cwd,
            network,
            patches or {},
            dict(os.environ),
            *map(Output, outputs),
        )
        context = multiprocessing.get_context("forkserver")
        self.process: ForkServerProcess = context.Process(target=command, args=arguments)
        with hidden_main():
            self.process.start()
        for _, write in pipes:
            os.close(write)
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, -N after signal N; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if (status := self.returncode) is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Everything that it still prints, once it has ended."""
        readers = ThreadPoolExecutor(2)
        said: list[Future[str]] = [readers.submit(f.read) for f in (self.stdout, self.stderr)]
        try:
            self.wait(timeout)
        finally:
            readers.shutdown(wait=False)
        return said[0].result(timeout), said[1].result(timeout)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def command(
    words: list[str],
    cwd: Path,
    network: str | None,
    patches: dict[str, object],
    env: dict[str, str],
    stdout: int,
    stderr: int,
) -> None:
    """Be `python -m words` in a process that the server has just forked."""
    for source, target in ((stdout, 1), (stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    # The server's own may be over a file, in which one can seek, unlike in a pipe.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    if network is not None:
        enter(network)
    os.chdir(cwd)
    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    for full, value in (patches | {f"{handler}.Popen": ForkedRank}).items():
        module, _, name = full.rpartition(".")
        vars(import_module(module))[name] = value
    become(words, env)


def enter(network: str) -> None:
    """Move this process into a network namespace, as `ip netns exec` does."""
    file = os.open(f"/run/netns/{network}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.setns(file, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    os.close(file)


def become(words: list[str], env: dict[str, str]) -> NoReturn:
    """Run a command as a new interpreter would, and exit with its status."""
    from fastimagenet import cli

    os.environ.clear()
    os.environ.update(env)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "OMP_NUM_THREADS" in env:
        import torch

        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    module, *argv = words
    spec = find_spec(module)
    name = f"{module}.__main__" if spec and spec.submodule_search_locations else module
    sys.argv = [name, *argv]
    status = 1
    try:
        status = cli.exit_status(import_module(name).main, argv)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def is_rank(process: int) -> bool:
    """Whether a launcher has started this process."""
    return Path(f"/proc/{process}/comm").read_text().startswith(RANK_NAME)


class ForkedRank(subprocess.Popen[bytes]):
    """A subprocess.Popen of `[python, "-u", "-m", module, ...]` that forks this process."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        executable, unbuffered, dash_m, *words = args
        assert (executable, unbuffered, dash_m) == (sys.executable, "-u", "-m")
        env = more[5]
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()  # as torch asks for, which signals the whole session
            Path("/proc/self/comm").write_text(f"{RANK_NAME}{env['RANK']}")
            become(words, env)
        self._child_created = True
