"""Batches of a CPU back end on a GPU, copied while the one before is trained on."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from pipelines.backends.stream import StreamLoader
from pipelines.loader import LoaderSpec


class Prefetcher(StreamLoader):
    """A `Loader` over another one of the same spec that hands out batches on `spec.device`.

    To a GPU each batch is copied on a stream of its own, from pinned memory, and made half there
    if the spec asks for it; on the CPU batches pass through. They are augmented where they arrive.
    """

    def __init__(self, loader: StreamLoader, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self.loader = loader
        self.device = torch.device(spec.device)

    def open(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        batches = self.loader.open(epoch, step)
        side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        try:
            for batch in batches:
                if side is not None:
                    # The caller has only queued its work on the batch before: this copy runs
                    # beside it.
                    batch = self.copy(batch, side)
                    self.hand_over(batch, side)
                yield batch
        finally:
            batches.close()

    def copy(self, batch: tuple[Tensor, Tensor], side: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        images, labels = (part if part.is_pinned() else part.pin_memory() for part in batch)
        with torch.cuda.stream(side):
            images = images.to(self.device, non_blocking=True)
            if self.spec.half:
                images = images.half()
            return images, labels.to(self.device, non_blocking=True)

    def hand_over(self, batch: tuple[Tensor, Tensor], side: torch.cuda.Stream) -> None:
        """Let the caller's stream wait for the copy and keep the memory until it is done with."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(side)
        for part in batch:
            part.record_stream(current)

    def close(self) -> None:
        super().close()
        self.loader.close()
