"""Finish on a CPU what DALI has decoded: torch resizes image by image, in threads.

With antialiasing torch resizes uint8 in a quarter of the time that DALI takes, and comes nearer to
Pillow. Each thread here would start as many of torch's own as there are cores: work that torch
would share among them is done in strips, or by numpy. Each image costs a dozen calls and no more,
since what Python takes for them, no other thread can use.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.backends.dali.feed import Fed, pieces
from pipelines.datasets.pixels import turned_upright
from pipelines.loader import LoaderSpec
from pipelines.sampling import Batch

STRIP = 2**15
"""Largest number of values that torch processes in a single thread."""
Floats = NDArray[np.float32]


class BufferPool:
    """Buffers of batches, reused once no tensor refers to any part of them: mapping the pages of
    new memory can take as long as resizing."""

    def __init__(self) -> None:
        self.free: deque[Floats] = deque(maxlen=3)

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor."""
        buffer = self.free.pop() if self.free else None
        if buffer is None or buffer.shape != shape:
            buffer = np.empty(shape, np.float32)
        view = buffer.view()  # kept alive by every tensor that shares its memory
        weakref.finalize(view, self.free.append, buffer).atexit = False
        return torch.from_numpy(view)


def finish_batches(
    spec: LoaderSpec, outputs: Iterator[tuple[Sequence[Any], Fed]]
) -> Generator[tuple[Tensor, Tensor, Batch]]:
    """Yield images (B, 3, H, W) float32, channels_last, of the batch's shape; labels; the batch.

    `outputs` are decoded images of any shapes, in lists of DALI's. Each batch is finished while its
    predecessor is consumed.
    """
    buffers = BufferPool()
    with ThreadPoolExecutor(spec.num_threads) as pool:
        started: deque[tuple[Tensor, Batch, list[Future[None]]]] = deque()
        for (decoded,), fed in outputs:
            batch, (high, wide) = fed.batch, fed.batch.shape
            images = buffers.take((len(fed.shapes), high, wide, 3))
            mean, std = (
                np.tile(255 * np.array(values, np.float32), (wide, 1))
                for values in (spec.mean, spec.std)
            )
            jobs = [
                pool.submit(finish_piece, decoded, fed, piece, mean, std, images.numpy())
                for piece in pieces(len(images), spec.num_threads)
            ]
            started.append((images, batch, jobs))
            if len(started) == 1:
                continue
            images, batch, jobs = started.popleft()
            for job in jobs:
                job.result()
            yield images.permute(0, 3, 1, 2), torch.from_numpy(batch.labels), batch


def finish_piece(
    decoded: Any, fed: Fed, piece: slice, mean: Floats, std: Floats, images: Floats
) -> None:
    """Turn, resize, crop, mirror and normalise a piece of a batch: of `decoded`, whose images are
    (h, w, 3) uint8, into `images` (B, H, W, 3). Mean and standard deviation (W, 3), in 0..255."""
    high, wide = fed.batch.shape
    strip = max(1, STRIP // mean.size)
    parts = fed.orientations, fed.size, fed.corner, fed.mirror
    for index, orientation, size, (top, left), flip in zip(
        range(piece.start, piece.stop), *(part[piece].tolist() for part in parts), strict=True
    ):
        stored = np.asarray(decoded[index])
        pixels = torch.from_numpy(
            stored if orientation == 1 else turned_upright(stored, orientation)
        )
        if list(pixels.shape[:2]) != size:
            # What torchvision's resize calls, which takes half as long again for small images.
            planes = pixels[None].permute(0, 3, 1, 2)
            resized = interpolate(planes, size, mode="bilinear", antialias=True)
            pixels = resized[0].permute(1, 2, 0)
        pixels = pixels[top : top + high, left : left + wide]
        image = images[index]
        if not flip:
            image[:] = pixels.numpy()  # to convert first is faster than to subtract bytes
        for row in range(0, high if flip else 0, strip):
            image[row : row + strip] = pixels[row : row + strip].flip(1).numpy()
        image -= mean
        image /= std
