"""What follows DALI's decoding on a CPU: torch resizes, image by image, in threads.

With antialiasing torch resizes uint8 in a quarter of the time that DALI takes, and comes nearer to
Pillow. torch's own threads are kept out of it, since each thread here would start as many as there
are cores: what torch would share out among them is done in pieces, or by numpy.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from pipelines.backends.torchvision import validation_crop
from pipelines.loader import LoaderSpec
from pipelines.sampling import Batch

PIECE = 2**15
"""Values that torch works on in one thread."""
Row = NDArray[np.float32]
Output = tuple[Any, Tensor, Batch]
"""Decoded images of any shapes, as DALI gives them, their labels, and what they are."""


class Memory:
    """Memory of batches, used again once nobody holds any part of them: to have the pages of fresh
    memory mapped can take as long as resizing."""

    def __init__(self) -> None:
        self.free: deque[NDArray[np.float32]] = deque(maxlen=3)

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of that shape with anything in it."""
        block = self.free.pop() if self.free else None
        if block is None or block.shape != shape:
            block = np.empty(shape, np.float32)
        lent = block.view()  # which every tensor that shares the memory keeps alive
        weakref.finalize(lent, self.free.append, block).atexit = False
        return torch.from_numpy(lent)


def finished(
    spec: LoaderSpec, outputs: Iterator[Output]
) -> Generator[tuple[Tensor, Tensor, Batch]]:
    """Images (B, 3, H, W) float32, channels_last, of the shape that the batch has; labels; batch.

    Each batch is worked on while the one before is used.
    """
    memory = Memory()
    with ThreadPoolExecutor(spec.num_threads) as pool:
        started: deque[tuple[Tensor, Tensor, Batch, list[Future[None]]]] = deque()
        for decoded, labels, batch in outputs:
            images = memory.take((len(labels), *batch.shape, 3))
            rows = images.numpy()
            mean, std = (
                np.tile(255 * np.array(values, np.float32), batch.shape[1])
                for values in (spec.mean, spec.std)
            )
            jobs = [
                pool.submit(
                    finish, spec, torch.from_dlpack(decoded[at]), batch, at, (mean, std), rows[at]
                )
                for at in range(len(labels))
            ]
            started.append((images, labels, batch, jobs))
            if len(started) == 1:
                continue
            images, labels, batch, jobs = started.popleft()
            for job in jobs:
                job.result()
            yield images.permute(0, 3, 1, 2), labels, batch


def finish(
    spec: LoaderSpec,
    pixels: Tensor,
    batch: Batch,
    index: int,
    mean_and_std: tuple[Row, Row],
    image: NDArray[np.float32],
) -> None:
    """Resize, crop, mirror and normalise image `index` of the batch: (h, w, 3) uint8 into `image`,
    (H, W, 3). Mean and standard deviation (W x 3,) are those of a row, in 0..255."""
    pixels = pixels.permute(2, 0, 1)
    if spec.training:
        pixels = resize(pixels, list(batch.shape), antialias=True)
    else:
        pixels = validation_crop(pixels, batch.shape, spec.resize_ratio)
    pixels = pixels.permute(1, 2, 0)
    mirrored = batch.draws is not None and not spec.reflect_pad and batch.draws.mirror[index]
    mean, std = mean_and_std
    height = max(1, PIECE // len(mean))
    for top in range(0, len(image), height):
        piece = pixels[top : top + height]
        piece = piece.flip(1) if mirrored else piece
        rows = image[top : top + height].reshape(len(piece), -1)
        rows[...] = piece.numpy().reshape(rows.shape)
        rows -= mean
        rows /= std
