"""The images of a split as squares of fixed sizes, made in processes where there are many."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from pipelines.augment.crops import normalise, on_device, resized_crop, window_crop
from pipelines.backends.stream import StreamLoader
from pipelines.backends.torchvision import decode, padded, validation_crop
from pipelines.datasets.images import ImageFile
from pipelines.datasets.split import Split, undecodable
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage, eval_range
from pipelines.sampling import Batch, Draws, Order, crop_box, place
from pipelines.workers import in_processes

CHUNK = 64
"""Files that are read at a time."""
MANY = 2000
"""Files from which on it pays to start processes, which takes seconds. Threads would not do: with
small images Python takes as long as libjpeg, and one thread at a time."""
T = TypeVar("T")


def of_all_files(
    read: Callable[[Sequence[ImageFile]], T], split: Split, rows: range, workers: int
) -> Generator[tuple[slice, T]]:
    """What `read` gives for the split's images `rows`, some at a time and in any order.

    With each come the places within `rows` of the images that it is of. Raises what `read` raises.
    """
    places = (slice(at, min(at + CHUNK, len(rows))) for at in range(0, len(rows), CHUNK))
    jobs = ((part, [split.files[row] for row in rows[part]]) for part in places)
    job = partial(with_places, read)
    many = workers > 1 and len(rows) >= MANY
    yield from in_processes(job, jobs, workers) if many else map(job, jobs)


def with_places(
    read: Callable[[Sequence[ImageFile]], T], job: tuple[slice, list[ImageFile]]
) -> tuple[slice, T]:
    places, files = job
    return places, read(files)


def shapes_of(files: Sequence[ImageFile]) -> NDArray[np.int64]:
    """(N, 2): height and width as the headers have them. UserError for a file without one."""
    shapes = []
    for file in files:
        try:
            with file.open() as stream, Image.open(stream) as image:
                shapes.append((image.height, image.width))
        except Exception as error:
            raise undecodable(file, error) from error
    return np.array(shapes, np.int64)


@dataclass(frozen=True, kw_only=True)
class Squares:
    """Decodes images and makes them square, each at several sizes."""

    sides: tuple[int, ...]
    training: bool
    reflect_pad: int
    resize_ratio: float

    def __call__(self, files: Sequence[ImageFile]) -> list[NDArray[np.uint8]]:
        """For each side, (N, side, side, 3). UserError for a file that cannot be decoded."""
        made: list[list[NDArray[np.uint8]]] = [[] for _ in self.sides]
        for file in files:
            try:
                image = decode(file)
            except Exception as error:
                raise undecodable(file, error) from error
            for side, squares in zip(self.sides, made, strict=True):
                squares.append(self.square(image, side).permute(1, 2, 0).numpy())
        return [np.stack(squares) for squares in made]

    def square(self, image: Tensor, side: int) -> Tensor:
        """(3, side, side) of (3, H, W), uint8."""
        if not self.training:
            return validation_crop(image, (side, side), self.resize_ratio)
        if self.reflect_pad:
            return padded(image, side - 2 * self.reflect_pad, self.reflect_pad)
        return functional.resize(image, [side, side], antialias=True)


BATCH_BYTES = 16
"""At most, for each value of a batch of kept images: uint8, and floats before and after steps."""
SHARE = 0.8
"""Of the free memory, at most: the network and its activations need the rest."""


class MemoryLoader(StreamLoader):
    """`Loader` from square images on the device: of the whole split, or of a shard to validate.

    They are made with the loader, once for each image size, and freed by `close`. With
    `reflect_pad` and in validation they give the very pixels of `TorchvisionLoader`. For
    random-area crops the whole image is kept, squeezed into a square: the smallest crop has about
    `image_size` pixels a side on it, but it has no more pixels a side than the largest image. An
    image of that shape already gives the pixels of `TorchvisionLoader`, up to its rounding; any
    other one the same crop, resized twice.

    Raises UserError if the images do not fit, and for a file that cannot be decoded.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self.order = Order(spec)
        self.device = torch.device(spec.device)
        self.mean = 255 * torch.tensor(spec.mean, dtype=torch.float32, device=self.device)
        self.std = 255 * torch.tensor(spec.std, dtype=torch.float32, device=self.device)
        own = eval_range(len(spec.split), spec.shard_id, spec.num_shards)
        self.rows = range(len(spec.split)) if spec.training else own
        """The places in the split of the images kept."""
        self.shapes: dict[str, NDArray[np.int64]] = {}
        """By copy: (N, 2), height and width of every image; for random-area crops only."""
        self.images: dict[tuple[str, int], Tensor] = {}
        """By copy and image size: (N, side, side, 3) uint8 on the device."""
        if any(stage.rect for stage in spec.stages):
            raise UserError(
                "--backend memory keeps squares and cannot validate rectangles: "
                "take --backend dali or torchvision, or leave rect out"
            )
        self.fill()

    def open(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        if not self.images:  # after `close`
            self.fill()
        for batch in self.order.batches(epoch, step):
            yield self.read(batch)

    def close(self) -> None:
        super().close()
        self.images = {}

    def fill(self) -> None:
        """Read every file; on an error nothing is kept."""
        spec, count = self.spec, len(self.rows)
        workers = max(1, spec.num_threads)
        if spec.training and not spec.reflect_pad:
            for stage in spec.stages:
                if stage.copy not in self.shapes:
                    shapes = self.shapes[stage.copy] = np.zeros((count, 2), np.int64)
                    source = spec.source(stage)
                    for rows, values in of_all_files(shapes_of, source, self.rows, workers):
                        shapes[rows] = values
        sides = {(stage.copy, stage.image_size): self.side(stage) for stage in spec.stages}
        self.check_memory(sides)
        # Stages of different image sizes may need the same squares.
        kept = {
            (copy, side): np.empty((count, side, side, 3), np.uint8)
            for (copy, _), side in sides.items()
        }
        for stage in {stage.copy: stage for stage in spec.stages}.values():
            read = Squares(
                sides=tuple(side for copy, side in kept if copy == stage.copy),
                training=spec.training,
                reflect_pad=spec.reflect_pad,
                resize_ratio=spec.resize_ratio,
            )
            for rows, squares in of_all_files(read, spec.source(stage), self.rows, workers):
                for side, images in zip(read.sides, squares, strict=True):
                    kept[stage.copy, side][rows] = images
        on_device = {key: torch.from_numpy(images).to(self.device) for key, images in kept.items()}
        self.images = {
            (copy, image_size): on_device[copy, side] for (copy, image_size), side in sides.items()
        }

    def side(self, stage: Stage) -> int:
        """Height and width of what is kept for all stages that are read like this one."""
        spec = self.spec
        if not spec.training:
            return stage.image_size
        if spec.reflect_pad:
            return stage.image_size + 2 * spec.reflect_pad
        alike = [
            other.min_scale
            for other in spec.stages
            if (other.copy, other.image_size) == (stage.copy, stage.image_size)
        ]
        largest = int(self.shapes[stage.copy].max())
        return min(ceil(stage.image_size / sqrt(min(alike))), largest)

    def check_memory(self, sides: dict[tuple[str, int], int]) -> None:
        """Raise UserError unless the images and the largest batch of them fit."""
        count = len(self.rows)
        squares = {(copy, side) for (copy, _), side in sides.items()}
        images = count * sum(3 * side**2 for _, side in squares)
        batch = max(
            min(stage.batch_size, count) * 3 * sides[stage.copy, stage.image_size] ** 2
            for stage in self.spec.stages
        )
        needed, there = images + BATCH_BYTES * batch, free_memory(self.device)
        if needed > SHARE * there:
            raise UserError(
                f"--backend memory needs {needed / 2**30:.1f} GiB for {count} images, "
                f"and {self.device} has {there / 2**30:.1f} GiB free, of which it takes "
                f"{SHARE:.0%} at most: take --backend dali, or lower image_size"
            )

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch as `Loader` has it; nothing here waits for the device."""
        rows = batch.indices - self.rows.start
        draws, size = batch.draws, batch.shape[0]
        images = self.images[batch.copy, size]
        if draws is None:
            labels, index = on_device(self.device, batch.labels, rows)
            pixels = images.index_select(0, index)
        elif self.spec.reflect_pad:
            starts = place(draws.offset, 2 * self.spec.reflect_pad + 1).T
            labels, index, top, left, mirror = on_device(
                self.device, batch.labels, rows, *starts, draws.mirror
            )
            pixels = window_crop(images, index, top, left, mirror, size)
        else:
            box = on_device(self.device, *self.crops(batch, rows, draws, images.shape[1]))
            labels, index, mirror = on_device(self.device, batch.labels, rows, draws.mirror)
            pixels = resized_crop(images, index, box, mirror, size)
        normal = normalise(pixels, self.mean, self.std)
        return normal.half() if self.spec.half else normal, labels

    def crops(
        self, batch: Batch, rows: NDArray[np.int64], draws: Draws, side: int
    ) -> NDArray[np.float32]:
        """(4, B): top, left, height and width of random-area crops, on the square images."""
        height, width = self.shapes[batch.copy][rows].T
        box = crop_box(height, width, draws, slice(None), self.spec.aspect_ratio)
        scale = side / np.stack([height, width, height, width])
        return (np.stack(box) * scale).astype(np.float32)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of a GPU's memory, or of the machine's without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(kibibytes)
