"""Run many small jobs on all cores, in processes that end with this one."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from math import ceil
from multiprocessing import forkserver, resource_tracker
from types import ModuleType
from typing import TypeVar

from pipelines import cgroup
from pipelines.errors import UserError
from pipelines.limits import check_shared_memory
from pipelines.signals import STOP_SIGNALS

Job = TypeVar("Job")
Result = TypeVar("Result")
PRELOADED = "torchvision.transforms.v2"
AHEAD = 4
"""Jobs per worker that are submitted at a time, so that a million results need no memory."""


def num_cores() -> int:
    """Count the cores that this process may use, within its container's quota, rounded up."""
    cores = len(os.sched_getaffinity(0))
    quota = cgroup.cpu_quota()
    return cores if quota is None else min(cores, max(1, ceil(quota)))


class WorkerKilled(UserError):
    """A worker process was ended, by the system or by what it decoded."""


def in_processes(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    remedy: str = "fewer --workers need less",
) -> Generator[Result]:
    """Yield `function(job)` for each job, in the order of completion.

    `function` has to be importable. What it raises is raised here; then, and when the caller stops
    reading, pending jobs are dropped. Raises WorkerKilled, with a `remedy`, where one is killed.
    """
    context = multiprocessing.get_context("forkserver")
    pending = iter(jobs)
    start_server()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        running: set[Future[Result]] = set()
        while True:
            submitted = list(islice(pending, AHEAD * workers - len(running)))
            with hidden_main():
                running |= {pool.submit(function, job) for job in submitted}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise WorkerKilled(
            "a worker process was killed, as happens when memory runs out or a file crashes its "
            f"decoder: {remedy}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def hidden_main() -> Iterator[None]:
    """Keep processes that are started here from importing the caller's script.

    That takes seconds if the script imports torch, and never ends for one without
    `if __name__ == "__main__":`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def preload_torchvision() -> None:
    """Import torchvision once for all future worker processes, in the background.

    To be called before the first is started: after that each imports it, which takes seconds.
    """
    check_shared_memory(", or take --backend dali")
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOADED])
    start_server()


def start_server() -> None:
    """Start the server that forks the workers, where it does not run yet.

    It and the workers block the stop signals, which may go to all processes of a group: their
    parent still needs the batches in flight, and they end when it ends. Raises UserError where
    there is no memory to share with them.
    """
    check_shared_memory()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks two of them
        leave_signals_to_parent()
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int = 0) -> None:
    """Block the stop signals; also where another program has started the server."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def kill_left_workers() -> None:
    """End the workers that an error has left: the SIGTERM that multiprocessing would send them at
    the end of this process they would not hear, and it would wait for them for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


atexit.register(kill_left_workers)  # before multiprocessing's own, which was registered earlier


def start_worker() -> None:
    """Leave signals to the parent, end when it ends, take one core, silence Pillow's warnings."""
    leave_signals_to_parent()
    os.environ["OMP_NUM_THREADS"] = "1"  # one core a worker, should it import torch
    if "torch" in sys.modules:  # preloaded
        sys.modules["torch"].set_num_threads(1)
    warnings.simplefilter("ignore")
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent process, then exit at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
