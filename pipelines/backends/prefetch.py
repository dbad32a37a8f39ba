"""Copy batches of main memory to a GPU, overlapped with training on the last one."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from torch import Tensor


def copied(
    batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Generator[tuple[Tensor, Tensor]]:
    """Yield the same batches, which are in pinned memory, on a GPU.

    They are copied on a CUDA stream of their own, which the caller's stream waits for; the host
    does not.
    """
    side = torch.cuda.Stream(device)
    for batch in batches:
        # The caller has only queued its work on the last batch: this copy overlaps it.
        with torch.cuda.stream(side):
            images, labels = (part.to(device, non_blocking=True) for part in batch)
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for part in (images, labels):
            part.record_stream(current)  # its memory is kept until the work on it is done
        yield images, labels
