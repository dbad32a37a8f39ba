"""Many small jobs on all cores, in processes that end with this one."""

from __future__ import annotations

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
from multiprocessing import forkserver
from types import ModuleType
from typing import TypeVar

from pipelines.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
PRELOADED = "torchvision.transforms.v2"
AHEAD = 4
"""Jobs per worker that are handed over at a time: results of a million need no memory."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Generator[Result]:
    """`function(job)` for each job, in the order in which they are done.

    `function` is one of an importable module. Whatever it raises is raised here; jobs not begun are
    dropped then, and when the caller stops reading. Raises UserError where a worker is killed.
    """
    context = multiprocessing.get_context("forkserver")
    left = iter(jobs)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        running: set[Future[Result]] = set()
        while True:
            room = AHEAD * workers - len(running)
            handed_over = list(islice(left, room))
            with hidden_main():
                running |= {pool.submit(function, job) for job in handed_over}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, as happens when memory runs out: fewer workers need less"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def hidden_main() -> Iterator[None]:
    """Let processes that are started here do without the caller's script.

    Each would import it again: seconds for one that imports torch, an endless chain for one without
    `if __name__ == "__main__":`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def preload_torchvision() -> None:
    """Have it imported once for all processes that are to come, beside what the caller does next.

    Too late once any process was started here: then each imports it, which takes seconds.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOADED])
    # Until it has imported, the server would die of a Ctrl-C with a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, end with it however it ends, and keep Pillow's warnings quiet."""
    os.environ["OMP_NUM_THREADS"] = "1"  # each has a core, should it import torch
    if "torch" in sys.modules:  # preloaded
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
