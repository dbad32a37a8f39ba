"""Train and validate from a cache of decoded images in the device's memory."""

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
from torch import Tensor
from torchvision.transforms.v2 import functional

from pipelines import cgroup
from pipelines.augment.crops import normalise, on_device, resized_crop, window_crop
from pipelines.backends.stream import StreamLoader
from pipelines.backends.torchvision import decode, padded, validation_crop
from pipelines.datasets.images import ImageFile
from pipelines.datasets.index import SCAN
from pipelines.datasets.split import undecodable
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage, eval_range
from pipelines.sampling import Batch, BatchSampler, CropParams, crop_box, to_index
from pipelines.workers import in_processes

CHUNK = 64
"""Files that a job reads."""
MANY = 2000
"""Files from which on it pays to start processes, which takes seconds. Threads would not help: with
small images Python takes as long as libjpeg, and holds its lock."""
BATCH_BYTES = 16
"""Upper bound of the bytes per value of a batch: uint8, and floats before and after each step."""
SHARE = 0.8
"""Largest share of the free memory to take: the network and its activations need the rest."""
REMEDY = f"--backend dali needs less, and {SCAN} DIR --decode finds such files"
T = TypeVar("T")


def read_chunk(
    read: Callable[[Sequence[ImageFile]], T], job: tuple[slice, list[ImageFile]]
) -> tuple[slice, T]:
    """Call `read` on the files of a job, in this process or a worker."""
    chunk, files = job
    return chunk, read(files)


@dataclass(frozen=True, kw_only=True)
class SquareDecoder:
    """Decodes images and makes them square, each at several sizes."""

    sides: tuple[int, ...]
    training: bool
    upright: bool
    reflect_pad: int
    resize_ratio: float

    def __call__(self, files: Sequence[ImageFile]) -> list[NDArray[np.uint8]]:
        """Decode N images: for each side, (N, side, side, 3). UserError for a damaged file."""
        decoded: list[list[NDArray[np.uint8]]] = [[] for _ in self.sides]
        for file in files:
            try:
                image = decode(file, self.upright)
            except Exception as error:
                raise undecodable(file, error) from error
            for side, squares in zip(self.sides, decoded, strict=True):
                squares.append(self.square(image, side).permute(1, 2, 0).numpy())
        return [np.stack(squares) for squares in decoded]

    def square(self, image: Tensor, side: int) -> Tensor:
        """Turn (3, H, W) uint8 into (3, side, side)."""
        if not self.training:
            return validation_crop(image, (side, side), self.resize_ratio)
        if self.reflect_pad:
            return padded(image, side - 2 * self.reflect_pad, self.reflect_pad)
        return functional.resize(image, [side, side], antialias=True)


class MemoryLoader(StreamLoader):
    """`Loader` from a cache of decoded square images on the device: of the whole split, or of a
    shard to validate.

    The cache is filled when the loader is made, once for each image size, and freed by `close`.
    With `reflect_pad` and in validation the pixels are exactly those of `TorchvisionLoader`. For
    random-area crops the whole image is squeezed into a square, so large that the smallest crop has
    about `image_size` pixels a side, but no larger than the largest image. An image that has that
    shape already gives the pixels of `TorchvisionLoader`, up to its rounding; any other one gives
    the same crop, resized twice.

    Raises UserError if the images do not fit, and for a file that cannot be decoded.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self.sampler = BatchSampler(spec)
        self.device = torch.device(spec.device)
        self.mean = 255 * torch.tensor(spec.mean, dtype=torch.float32, device=self.device)
        self.std = 255 * torch.tensor(spec.std, dtype=torch.float32, device=self.device)
        own = eval_range(len(spec.split), spec.shard_id, spec.num_shards)
        self.indices = range(len(spec.split)) if spec.training else own
        """Indices in the split of the N images that are cached."""
        self.shapes: dict[str, NDArray[np.int64]] = {}
        """By copy: (N, 2) heights and widths of the images; for random-area crops only."""
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
        for batch in self.sampler.batches(epoch, step):
            yield self.read(batch)

    def close(self) -> None:
        super().close()
        self.images = {}

    def fill(self) -> None:
        """Decode every file into the cache; on an error it stays empty."""
        spec, count = self.spec, len(self.indices)
        copies = dict.fromkeys(stage.copy for stage in spec.stages)
        random_area = spec.training and not spec.reflect_pad
        for copy in copies:
            if random_area and copy not in self.shapes:
                shapes = spec.source(copy).shapes_of(np.asarray(self.indices), spec.upright)
                self.shapes[copy] = shapes
        sides = {(stage.copy, stage.image_size): self.side(stage) for stage in spec.stages}
        self.check_memory(sides)
        # Stages of different image sizes may share squares.
        cache = {
            (copy, side): torch.empty(count, side, side, 3, dtype=torch.uint8, device=self.device)
            for copy, side in {(copy, side) for (copy, _), side in sides.items()}
        }
        for copy in copies:
            decoder = SquareDecoder(
                sides=tuple(side for other, side in cache if other == copy),
                training=spec.training,
                upright=spec.upright,
                reflect_pad=spec.reflect_pad,
                resize_ratio=spec.resize_ratio,
            )
            for chunk, squares in self.read_files(decoder, copy):
                for side, images in zip(decoder.sides, squares, strict=True):
                    cache[copy, side][chunk].copy_(torch.from_numpy(images))
        self.images = {
            (copy, image_size): cache[copy, side] for (copy, image_size), side in sides.items()
        }

    def read_files(
        self, read: Callable[[Sequence[ImageFile]], T], copy: str
    ) -> Generator[tuple[slice, T]]:
        """Call `read` on a copy's files of the cached images, CHUNK at a time, in any order.

        Yields which of the cached images were read, and the result. Raises what `read` raises.
        """
        files, count = self.spec.source(copy).files, len(self.indices)
        chunks = (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
        jobs = ((chunk, [files[index] for index in self.indices[chunk]]) for chunk in chunks)
        job, num_workers = partial(read_chunk, read), self.spec.num_threads
        many = num_workers > 1 and count >= MANY
        yield from in_processes(job, jobs, num_workers, REMEDY) if many else map(job, jobs)

    def side(self, stage: Stage) -> int:
        """Height and width of the squares for all stages of this one's copy and image size."""
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
        count = len(self.indices)
        squares = {(copy, side) for (copy, _), side in sides.items()}
        images = count * sum(3 * side**2 for _, side in squares)
        batch = max(
            min(stage.batch_size, count) * 3 * sides[stage.copy, stage.image_size] ** 2
            for stage in self.spec.stages
        )
        needed, free = images + BATCH_BYTES * batch, free_memory(self.device)
        if needed > SHARE * free:
            raise UserError(
                f"--backend memory needs {needed / 2**30:.1f} GiB for {count} images, "
                f"and {self.device} has {free / 2**30:.1f} GiB free, of which it takes "
                f"{SHARE:.0%} at most: take --backend dali, or lower image_size"
            )

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Make a batch from cached images, without synchronising with the device."""
        rows = batch.indices - self.indices.start
        crops, size = batch.crops, batch.shape[0]
        images = self.images[batch.copy, size]
        if crops is None:
            labels, index = on_device(self.device, batch.labels, rows)
            pixels = images.index_select(0, index)
        elif self.spec.reflect_pad:
            starts = to_index(crops.offset, 2 * self.spec.reflect_pad + 1).T
            labels, index, top, left, mirror = on_device(
                self.device, batch.labels, rows, *starts, crops.mirror
            )
            pixels = window_crop(images, index, top, left, mirror, size)
        else:
            box = on_device(self.device, *self.boxes(batch, rows, crops, images.shape[1]))
            labels, index, mirror = on_device(self.device, batch.labels, rows, crops.mirror)
            pixels = resized_crop(images, index, box, mirror, size)
        normal = normalise(pixels, self.mean, self.std)
        return normal.half() if self.spec.half else normal, labels

    def boxes(
        self, batch: Batch, rows: NDArray[np.int64], crops: CropParams, side: int
    ) -> NDArray[np.float32]:
        """Scale random-area crops to squares of `side`: (4, B) top, left, height and width."""
        height, width = self.shapes[batch.copy][rows].T
        box = crop_box(height, width, crops, slice(None), self.spec.aspect_ratio)
        scale = side / np.stack([height, width, height, width])
        return (np.stack(box) * scale).astype(np.float32)


def free_memory(device: torch.device) -> int:
    """Bytes free in a GPU's memory, or in main memory without swapping, within the container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    free, allowed = 1024 * int(kibibytes), cgroup.free_memory()
    return free if allowed is None else min(free, allowed)
