"""The collectives between processes, and the one line when another process dies or hangs."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastimagenet.distributed.meeting import meet
from fastimagenet.distributed.world import TIMEOUT_SECONDS, World, agent_has_store
from fastimagenet.errors import PeerLost
from pipelines.limits import allow_open_files

if TYPE_CHECKING:
    from torch import Tensor


ROLL_CALL_SECONDS = 3
COMMUNICATION = re.compile(r"gloo|NCCL|[Cc]onnection|[Tt]imed out|Timeout|Broken pipe|Socket")
"""Words of torch.distributed's errors, which have no class of their own."""


@contextmanager
def collective(what: str, world: World) -> Iterator[None]:
    """Turn the errors of torch.distributed in the block, named `what`, into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if world.world_size == 1 or not COMMUNICATION.search(str(error)):
            raise
        reason = re.sub(r"\[\S+\.cc:\d+\] ", "", str(error).splitlines()[0])
        reason = reason.rpartition("RuntimeError: ")[2].partition(". ")[0].rstrip(".")
        raise PeerLost(
            f"rank {world.rank}, in {what}: no word from {silent_ranks(world)} ({reason})"
        ) from None


def silent_ranks(world: World) -> str:
    """Name the ranks that do not answer within seconds at the store where the processes met."""
    import torch

    heard: list[int] = []

    def call() -> None:
        with suppress(Exception):  # the node with the store may be gone, too
            store = torch.distributed.distributed_c10d._get_default_store()
            store.set(f"lost/{world.rank}", "")
            until = time.monotonic() + ROLL_CALL_SECONDS
            while len(heard) < world.world_size and time.monotonic() < until:
                time.sleep(0.1)
                heard[:] = [r for r in range(world.world_size) if store.check([f"lost/{r}"])]

    caller = threading.Thread(target=call, daemon=True)  # a cut link would block the call itself
    caller.start()
    caller.join(2 * ROLL_CALL_SECONDS)
    ranks = [str(r) for r in range(world.world_size) if r not in (world.rank, *heard)]
    return f"rank {', '.join(ranks)}" if ranks else "a rank that has failed itself"


@contextmanager
def process_group(
    world: World, timeout_seconds: float = TIMEOUT_SECONDS, run: str = ""
) -> Iterator[None]:
    """Join the process group and leave it at the end; does nothing for a single process.

    In between, waiting longer than the timeout for another process raises PeerLost. `run`: a name
    that all processes of a run have and others may not, so that runs which meet do not mix; then
    and where a port is taken it raises UserError.
    """
    import torch

    if world.device != "cpu":
        torch.cuda.set_device(world.device)
    if world.world_size == 1:
        yield
        return
    # gloo ends the process where it cannot open a connection.
    allow_open_files(f"a run of {world.world_size} processes", 4 * world.world_size + 16)
    backend = "gloo" if world.device == "cpu" else "nccl"
    timeout = timedelta(seconds=timeout_seconds)
    store = None if agent_has_store() else meet(world, timeout_seconds, run)
    with collective("the start", world):
        torch.distributed.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout
        )
    yield
    # Not after an error: NCCL's teardown waits for the others, who wait in a collective.
    torch.distributed.destroy_process_group()


def all_reduce_sum(tensor: Tensor, world: World, what: str) -> Tensor:
    """Sum `tensor` over all processes, in place, and return it."""
    if world.world_size > 1:
        import torch

        with collective(what, world):
            torch.distributed.all_reduce(tensor)
    return tensor


def broadcast(tensors: Iterable[Tensor], world: World, what: str) -> None:
    """Overwrite the tensors of every process with those of rank 0."""
    if world.world_size > 1:
        import torch

        with collective(what, world):
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)


def any_process(flag: bool, world: World, what: str) -> bool:
    """Tell whether the flag is set on any process; every process has to call it."""
    if world.world_size == 1:
        return flag
    import torch

    flags = torch.tensor(int(flag), device=world.device)
    return bool(all_reduce_sum(flags, world, what).item())


class Word:
    """A word that any process can say to all others, without waiting for them."""

    def __init__(self, word: str, world: World) -> None:
        self._key, self._world, self._store = f"said/{word}", world, None
        if world.world_size > 1:
            import torch

            self._store = torch.distributed.distributed_c10d._get_default_store()

    def said(self, say: bool) -> bool:
        """Tell whether this process says it now, or any one has said it. No collective."""
        if self._store is None:
            return say
        with collective(f"asking for {self._key}", self._world):
            if say:
                self._store.set(self._key, "")
            return say or bool(self._store.check([self._key]))

    def forget(self) -> None:
        """Unsay it; only when no process asks any more."""
        if self._store is not None and self._world.is_main:
            self._store.delete_key(self._key)


def gather_objects(value: Any, world: World, what: str) -> list[Any]:
    """Gather the plain values of all processes, by rank, on each of them."""
    if world.world_size == 1:
        return [value]
    import torch

    values: list[Any] = [None] * world.world_size
    with collective(what, world):
        torch.distributed.all_gather_object(values, value)
    return values
