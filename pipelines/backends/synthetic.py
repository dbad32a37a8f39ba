"""Train on random noise in the shape of images, to measure training without reading data."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from pipelines.backends.stream import StreamLoader
from pipelines.loader import LoaderSpec
from pipelines.sampling import BatchSampler


class SyntheticLoader(StreamLoader):
    """`Loader` with the labels of the split and one batch of normal noise per image size."""

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self.sampler = BatchSampler(spec)
        self.noise: Tensor | None = None

    def open(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        device = torch.device(self.spec.device)
        for batch in self.sampler.batches(epoch, step):
            images = self.images(len(batch.labels), batch.shape, device)
            labels = torch.from_numpy(batch.labels).to(device, non_blocking=True)
            yield images, labels

    def images(self, count: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Return a view of the noise, (count, 3, *shape), drawn anew where the shape changes."""
        noise = self.noise
        if noise is None or len(noise) < count or noise.shape[2:] != shape:
            generator = torch.Generator(device).manual_seed(self.spec.seed)
            dtype = torch.float16 if self.spec.half else torch.float32
            noise = torch.randn(
                (count, *shape, 3), generator=generator, device=device, dtype=dtype
            ).permute(0, 3, 1, 2)
            self.noise = noise
        return noise[:count]

    def close(self) -> None:
        super().close()
        self.noise = None
