"""When another process is gone or hangs: one line that names the ranks and the operation."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastimagenet.distributed import World

ROLL_CALL_SECONDS = 3
COMMUNICATION = re.compile(r"gloo|NCCL|[Cc]onnection|[Tt]imed out|Timeout|Broken pipe|Socket")
"""What torch.distributed writes into its errors, which are of no class of their own."""


class PeerLost(Exception):
    """Other processes of the run died or fell behind; the text names them and the operation."""


@contextmanager
def exchanging(what: str, world: World) -> Iterator[None]:
    """Turn what torch.distributed raises in the block, named `what`, into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if world.world_size == 1 or not COMMUNICATION.search(str(error)):
            raise
        reason = re.sub(r"\[\S+\.cc:\d+\] ", "", str(error).splitlines()[0])
        reason = reason.rpartition("RuntimeError: ")[2].partition(". ")[0].rstrip(".")
        raise PeerLost(
            f"rank {world.rank}, in {what}: no word from {silent(world)} ({reason})"
        ) from None


def silent(world: World) -> str:
    """The ranks that do not answer within seconds at the store where the processes have met."""
    import torch

    heard: list[int] = []

    def call() -> None:
        with suppress(Exception):  # the machine with the store may be gone, too
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
