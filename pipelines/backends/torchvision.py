"""Read with Pillow and torchvision: the portable back end, and the reference for pixels."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Generator, Sequence
from math import ceil
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from pipelines.augment.crops import normalise
from pipelines.backends.prefetch import copied
from pipelines.backends.stream import StreamLoader
from pipelines.datasets.images import ImageFile
from pipelines.datasets.pixels import rgb
from pipelines.datasets.split import undecodable
from pipelines.errors import UserError
from pipelines.limits import SHARED_MEMORY, allow_open_files
from pipelines.loader import LoaderSpec, resized_side
from pipelines.sampling import Batch, BatchSampler, CropParams, crop_box, to_index
from pipelines.workers import leave_signals_to_parent, preload_torchvision


class TorchvisionLoader(StreamLoader):
    """`Loader` with worker processes, which send uint8: it is normalised on the spec's device.

    Workers are spawned, not forked, since other threads of this process may hold locks: a script
    that makes a loader needs the usual `if __name__ == "__main__":`.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        assert spec.device != "cpu" or not spec.half, "float16 is for GPUs"
        check_limits(spec)
        self.sampler = BatchSampler(spec)

    def open(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        device = torch.device(self.spec.device)
        mean, std = (
            255 * torch.tensor(values, dtype=torch.float32, device=device)
            for values in (self.spec.mean, self.spec.std)
        )
        batches = self.read(epoch, step)
        try:
            for pixels, labels in batches if device.type == "cpu" else copied(batches, device):
                images = normalise(pixels, mean, std)
                yield images.half() if self.spec.half else images, labels
        finally:
            batches.close()

    def read(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        """Yield (B, H, W, 3) uint8 and labels in main memory, pinned if the spec names a GPU."""
        if self.spec.num_threads:
            preload_torchvision()
        context = multiprocessing.get_context("forkserver")
        loader = DataLoader(
            BatchReader(self.spec),
            # Where samplers usually yield indices, a worker gets the whole description of a batch.
            batch_sampler=cast("Sequence[list[int]]", self.sampler.batches(epoch, step)),
            collate_fn=identity,
            num_workers=self.spec.num_threads,
            multiprocessing_context=context if self.spec.num_threads else None,
            pin_memory=self.spec.device != "cpu",
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # else the caller's global generator is drawn from
        )
        batches = iter(loader)
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            del batches  # the last reference: its workers stop


class BatchReader(Dataset[tuple[Tensor, Tensor]]):
    """Reads batches as `BatchSampler` describes them."""

    def __init__(self, spec: LoaderSpec) -> None:
        self.training = spec.training
        self.upright = spec.upright
        self.reflect_pad = spec.reflect_pad
        self.aspect_ratio = spec.aspect_ratio
        self.resize_ratio = spec.resize_ratio

    def __getitems__(self, batch: Batch) -> tuple[Tensor, Tensor] | UserError:
        """Read a batch: pixels (B, H, W, 3) uint8 and labels (B,) int64.

        An error is returned, since the DataLoader would wrap a raised one in a long text.
        """
        pixels = shared_pixels(len(batch.files), batch.shape)
        for index, file in enumerate(batch.files):
            try:
                image = decode(file, self.upright)
            except Exception as error:
                return undecodable(file, error)
            if batch.crops is None:
                image = validation_crop(image, batch.shape, self.resize_ratio)
            else:
                image = self.random_crop(image, batch.shape[0], batch.crops, index)
            pixels[index] = image.permute(1, 2, 0)
        return pixels, torch.from_numpy(batch.labels)

    def random_crop(self, image: Tensor, size: int, crops: CropParams, index: int) -> Tensor:
        """Crop one image at random and perhaps mirror it: (3, size, size) uint8."""
        if self.reflect_pad:
            image = padded(image, size, self.reflect_pad)
            top, left = to_index(crops.offset[index], 2 * self.reflect_pad + 1).tolist()
            image = functional.crop(image, top, left, size, size)
        else:
            box = crop_box(image.shape[1], image.shape[2], crops, index, self.aspect_ratio)
            edges = [edge.item() for edge in box]
            image = functional.resized_crop(image, *edges, [size, size], antialias=True)
        return functional.horizontal_flip(image) if crops.mirror[index] else image


FILES_PER_WORKER = 10
"""Open ones in the parent: pipes, and two for each of the batches on their way."""


def check_limits(spec: LoaderSpec) -> None:
    """Raise UserError unless the system allows the workers what they share with their parent.

    That is memory for the batches on their way, without which a worker would be killed, and open
    files, without which it would print a traceback.
    """
    # Beside this loader there is one of the other split.
    more = 2 * (FILES_PER_WORKER * spec.num_threads + 16)
    allow_open_files(f"--backend torchvision with {spec.num_threads} workers", more)
    largest = max(spec.stages, key=lambda stage: stage.batch_size * stage.image_size**2)
    batch = 3 * largest.batch_size * largest.image_size**2
    # Each worker has two ahead; two more are with the caller.
    needed = (2 * spec.num_threads + 2) * batch if spec.num_threads else 0
    size = os.statvfs(SHARED_MEMORY)
    free = size.f_bavail * size.f_frsize
    if needed > free:
        raise UserError(
            f"--backend torchvision with {spec.num_threads} workers and batches of "
            f"{largest.batch_size} at {largest.image_size} px needs {needed / 2**20:,.0f} MiB of "
            f"shared memory, and {SHARED_MEMORY} has {free / 2**20:,.0f} MiB free: docker run "
            f"--shm-size={ceil(needed / 2**30)}g for each process of the node, or --backend dali"
        )


def shared_pixels(count: int, shape: tuple[int, int]) -> Tensor:
    """Return zeros (count, *shape, 3) uint8, in a worker in memory that it shares with its parent.

    `default_collate` allocates it. Batches elsewhere would be copied there when sent, and malloc
    leaves ever more holes of a batch each: workers with batches of 50 at 224 px, of floats, grew
    from 190 MiB to up to 1 GiB in 14 epochs, and keep to 150 to 180 MiB this way.
    """
    nothing = torch.zeros((), dtype=torch.uint8).expand(*shape, 3)
    pixels: Tensor = default_collate([nothing] * count)
    return pixels


def decode(file: ImageFile, upright: bool = False) -> Tensor:
    """Decode an image: (3, H, W) uint8 RGB, turned by its EXIF orientation where `upright`.

    Raises what Pillow raises.
    """
    with file.open() as stream, Image.open(stream) as image:
        return functional.pil_to_tensor(rgb(image, upright))


def padded(image: Tensor, size: int, pad: int) -> Tensor:
    """Resize the whole image to size x size, then pad each side by `pad` pixels by reflection."""
    image = functional.resize(image, [size, size], antialias=True)
    return functional.pad(image, [pad], padding_mode="reflect")


def validation_crop(image: Tensor, shape: tuple[int, int], resize_ratio: float) -> Tensor:
    """Resize the short side, then take the centre: (3, *shape) uint8."""
    short = resized_side(min(shape), resize_ratio)
    image = functional.resize(image, [short], InterpolationMode.BILINEAR, antialias=True)
    return functional.center_crop(image, list(shape))


def identity(batch: Any) -> Any:
    """Return the batch, which BatchReader has already collated."""
    return batch
