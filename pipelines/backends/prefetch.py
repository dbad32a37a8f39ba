"""Copy the batches of a CPU back end to a GPU, overlapped with training on the last one."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from pipelines.backends.stream import StreamLoader
from pipelines.loader import LoaderSpec


class Prefetcher(StreamLoader):
    """A `Loader` that copies the batches of another one of the same spec to `spec.device`.

    Copies to a GPU are made from pinned memory on a CUDA stream of their own, and converted to
    float16 there if the spec asks for it; on the CPU batches pass through. Augmentation follows on
    `spec.device`.
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
                    # The caller has only queued its work on the last batch: this copy overlaps it.
                    batch = self.copy(batch, side)
                    self.hand_over(batch, side)
                yield batch
        finally:
            batches.close()

    def copy(self, batch: tuple[Tensor, Tensor], side: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        """Queue the copy of a batch on the stream `side`."""
        images, labels = (part if part.is_pinned() else part.pin_memory() for part in batch)
        with torch.cuda.stream(side):
            images = images.to(self.device, non_blocking=True)
            if self.spec.half:
                images = images.half()
            return images, labels.to(self.device, non_blocking=True)

    def hand_over(self, batch: tuple[Tensor, Tensor], side: torch.cuda.Stream) -> None:
        """Let the caller's stream wait for the copy, and keep the memory until it is consumed."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(side)
        for part in batch:
            part.record_stream(current)

    def close(self) -> None:
        super().close()
        self.loader.close()
