"""Keep the position of a loader: what all back ends share of the `Loader` protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from pipelines.augment.mixing import augment
from pipelines.loader import LoaderSpec

if TYPE_CHECKING:
    from torch import Tensor


class StreamLoader(ABC):
    """A `Loader` over an endless stream of batches that a back end opens at a position.

    The stream stays open from epoch to epoch, so that prefetching crosses their boundaries.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self.spec = spec
        self.epoch = 0
        self.step = 0
        self.stream: Generator[tuple[Tensor, Tensor]] | None = None
        self.stream_at = (0, 0)
        """Epoch and step of the stream's next batch."""

    @abstractmethod
    def open(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        """Yield all batches from a position on, cropped and flipped; closing frees resources."""

    def __len__(self) -> int:
        return self.spec.steps_at(self.epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.step < len(self):
            batch = self.next_batch()
            self.step += 1
            yield batch
        self.epoch += 1
        self.step = 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Read and augment the batch at the position; a jump discards prefetched batches."""
        epoch, step = self.epoch, self.step
        if self.stream is not None and self.stream_at != (epoch, step):
            self.close_stream()
        if self.stream is None:
            self.stream = self.open(epoch, step)
        try:
            batch = next(self.stream)
        except BaseException:
            self.close_stream()
            raise
        self.stream_at = (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)
        return augment(*batch, self.spec, epoch, step) if self.spec.training else batch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]

    def close(self) -> None:
        self.close_stream()

    def close_stream(self) -> None:
        """Stop reading and free its threads and processes; caches stay."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None
