"""Where the processes of a run meet: a store at an address, and what else may listen there."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastimagenet.distributed.world import World, master, started_by_us, step_of_job
from fastimagenet.errors import PeerLost
from pipelines.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

Result = TypeVar("Result")
RUN_KEY = "fastimagenet/run"
"""In the store: the name of the run that meets there."""
PROBE_SECONDS = 2


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return what `call` returns. Raises TimeoutError where it takes longer, and leaves it behind.

    torch's store waits without end for an answer of what is no store.
    """
    result: Future[Result] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return result.result(max(0.0, min(seconds, threading.TIMEOUT_MAX)))


def listens(host: str, port: int) -> bool:
    """Tell whether anything accepts connections there."""
    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def meet(world: World, timeout_seconds: float, run: str) -> TCPStore:
    """Return the store where all processes of the run called `run` have met; rank 0 hosts it.

    Raises UserError where another run or program has its port, and PeerLost naming the ranks that
    have not come within the timeout.
    """
    host, port = master()
    run = ", ".join(filter(None, (step_of_job(), run)))
    try:
        store, other = within(timeout_seconds, partial(_connect, world, timeout_seconds, run))
    except (RuntimeError, TimeoutError) as error:  # torch's errors are RuntimeErrors
        if "EADDRINUSE" in str(error):
            raise _taken(port, f"rank 0 cannot listen there on {host}") from None
        if listens(host, port):
            raise _taken(port, f"what answers on {host} is not rank 0 of this run") from None
        raise PeerLost(
            f"rank {world.rank}, in the start: rank 0 does not answer at port {port} of {host} "
            f"within {timeout_seconds:g} s"
        ) from None
    if other != run:
        raise _taken(port, f"another run meets there on {host}: {other or 'without a name'}")
    own = f"{socket.gethostname()}, process {os.getpid()}"
    first = store.compare_set(_rank_key(world.rank), "", own).decode()
    if first != own:
        raise _taken(port, f"another rank {world.rank} has met there on {host}: {first}")
    keys = [_rank_key(rank) for rank in range(world.world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_seconds))
    except RuntimeError:
        silent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise PeerLost(
            f"rank {world.rank}, in the start: no word from rank {', '.join(silent)} within "
            f"{timeout_seconds:g} s"
        ) from None
    return store


def _connect(world: World, timeout_seconds: float, run: str) -> tuple[TCPStore, str]:
    """Return the store, and the name of the run that meets there."""
    from torch.distributed import TCPStore

    host, port = master()
    timeout = timedelta(seconds=timeout_seconds)
    store = TCPStore(host, port, world.world_size, world.is_main, timeout, wait_for_workers=False)
    if world.is_main:
        store.set(RUN_KEY, run)
    return store, store.get(RUN_KEY).decode()


def _rank_key(rank: int) -> str:
    return f"fastimagenet/rank/{rank}"


def _taken(port: int, reason: str) -> Exception:
    if started_by_us():  # in the moment since our launcher has found it free: a restart helps
        return PeerLost(f"port {port} is in use: {reason}")
    return UserError(
        f"port {port} is in use: set MASTER_PORT to a free one, the same for all processes "
        f"({reason})"
    )
