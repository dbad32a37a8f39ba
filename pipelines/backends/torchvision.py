"""The portable back end, and the reference for pixels: Pillow decodes, torchvision transforms."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from pipelines.augment.crops import normalise
from pipelines.backends.stream import StreamLoader
from pipelines.datasets.images import ImageFile
from pipelines.datasets.split import undecodable
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec
from pipelines.sampling import Batch, Draws, Order, crop_box, place
from pipelines.workers import preload_torchvision


class TorchvisionLoader(StreamLoader):
    """`Loader` by worker processes; batches stay in main memory, pinned if the spec names a GPU.

    The workers are started afresh, not forked from this process, where other threads may hold
    locks: a script that makes a loader needs the usual `if __name__ == "__main__":`.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        assert not spec.half, "float16 is for GPUs"
        self.order = Order(spec)

    def open(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        preload_torchvision()
        context = multiprocessing.get_context("forkserver")
        loader = DataLoader(
            BatchReader(self.spec),
            # A worker gets the whole description of a batch where samplers mostly name indices.
            batch_sampler=cast("Sequence[list[int]]", self.order.batches(epoch, step)),
            collate_fn=as_it_is,
            num_workers=self.spec.num_threads,
            multiprocessing_context=context if self.spec.num_threads else None,
            pin_memory=self.spec.device != "cpu",
            worker_init_fn=leave_interrupts_to_parent,
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
    """Reads the batches that `Order` describes."""

    def __init__(self, spec: LoaderSpec) -> None:
        self.training = spec.training
        self.reflect_pad = spec.reflect_pad
        self.aspect_ratio = spec.aspect_ratio
        self.resize_ratio = spec.resize_ratio
        self.mean = 255 * torch.tensor(spec.mean, dtype=torch.float32)
        self.std = 255 * torch.tensor(spec.std, dtype=torch.float32)

    def __getitems__(self, batch: Batch) -> tuple[Tensor, Tensor] | UserError:
        """Images (B, 3, H, W) float32, channels_last, and labels (B,) int64.

        An error is returned, since the DataLoader would wrap a raised one in a long text.
        """
        pixels = torch.empty((len(batch.files), *batch.shape, 3), dtype=torch.uint8)
        for index, file in enumerate(batch.files):
            try:
                image = decode(file)
            except Exception as error:
                return undecodable(file, error)
            if batch.draws is None:
                image = validation_crop(image, batch.shape, self.resize_ratio)
            else:
                image = self.augment(image, batch.shape[0], batch.draws, index)
            pixels[index] = image.permute(1, 2, 0)
        images = normalise(shared_floats(pixels), self.mean, self.std)
        return images, torch.from_numpy(batch.labels)

    def augment(self, image: Tensor, size: int, draws: Draws, index: int) -> Tensor:
        """A random crop of one image, (3, size, size) uint8, perhaps mirrored."""
        if self.reflect_pad:
            image = padded(image, size, self.reflect_pad)
            top, left = place(draws.offset[index], 2 * self.reflect_pad + 1).tolist()
            image = functional.crop(image, top, left, size, size)
        else:
            box = crop_box(image.shape[1], image.shape[2], draws, index, self.aspect_ratio)
            edges = [edge.item() for edge in box]
            image = functional.resized_crop(image, *edges, [size, size], antialias=True)
        return functional.horizontal_flip(image) if draws.mirror[index] else image


def shared_floats(pixels: Tensor) -> Tensor:
    """The pixels as float32, which a worker puts where its parent reads them.

    `default_collate` knows where that is. Floats that lie elsewhere are copied there as they are
    sent, and malloc leaves ever more holes of a batch each: workers with batches of 50 at 224 px
    grew from 190 MiB to up to 1 GiB in 14 epochs, and keep to 150 to 180 MiB this way.
    """
    nothing = torch.zeros(()).expand(pixels.shape[1:])
    return default_collate([nothing] * len(pixels)).copy_(pixels)


def leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C in a terminal reaches the workers, too, but the batches in flight are still wanted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def decode(file: ImageFile) -> Tensor:
    """(3, H, W) uint8 RGB; EXIF orientation is not applied. Raises what Pillow raises."""
    with file.open() as stream, Image.open(stream) as image:
        return functional.pil_to_tensor(image.convert("RGB"))


def padded(image: Tensor, size: int, pad: int) -> Tensor:
    """The whole image at size x size, each side extended by `pad` pixels by reflection, uint8."""
    image = functional.resize(image, [size, size], antialias=True)
    return functional.pad(image, [pad], padding_mode="reflect")


def validation_crop(image: Tensor, shape: tuple[int, int], resize_ratio: float) -> Tensor:
    """Resize the short side, then take the centre: (3, *shape) uint8."""
    short = int(min(shape) * resize_ratio + 0.5)
    image = functional.resize(image, [short], InterpolationMode.BILINEAR, antialias=True)
    return functional.center_crop(image, list(shape))


def as_it_is(batch: Any) -> Any:
    """The batch, which BatchReader has already put together."""
    return batch
