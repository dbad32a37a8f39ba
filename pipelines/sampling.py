"""Choose the images of every batch and draw the random numbers that augment them.

All randomness of the data layer follows from the streams here and (seed, epoch, step, shard) alone.
So batches do not depend on the back end, its threads or its past; a position in a run is two
integers; and every back end cuts the same crops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, unique
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.datasets.images import ImageFile
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage, eval_range, resized_side

ATTEMPTS = 10
"""Tries for a crop that fits inside the image, as many as torchvision's RandomResizedCrop makes."""


@unique
class Stream(Enum):
    """Every stream of random numbers: its id, and how many integers a key has after it.

    Two streams may share an id only where one key has more than four integers, id included, and the
    other has fewer: NumPy pads keys with zeros to four, so (a, b) and (a, b, 0) seed the same
    generator, but no key of five equals a shorter one.
    """

    PERMUTATION = 1, 2  # seed, epoch
    CROPS = 2, 4  # seed, epoch, step, shard
    FLIPS = 3, 1  # seed
    AUTO = 3, 4  # seed, epoch, step, shard; as the next three
    JITTER = 4, 4
    ERASE = 5, 4
    MIX = 6, 4
    SHARD_SHUFFLE = 7, 1  # seed

    def generator(self, *key: int) -> np.random.Generator:
        """A generator at the start of the part of the stream that `key` names."""
        stream_id, length = self.value
        assert len(key) == length, f"{self.name} has keys of {length}"
        return np.random.default_rng((stream_id, *key))


@dataclass(frozen=True)
class CropParams:
    """The random numbers of a training batch."""

    area: NDArray[np.float32]
    """(B, ATTEMPTS): share of the image's area, uniform in [min_scale, 1)."""
    ratio: NDArray[np.float32]
    """(B, ATTEMPTS): width / height, log-uniform in the spec's range."""
    offset: NDArray[np.float32]
    """(B, 2): offset of the crop as a share of the room, vertical then horizontal, in [0, 1)."""
    mirror: NDArray[np.int32]
    """(B,): 1 to flip left-right."""


@dataclass(frozen=True)
class Batch:
    """One batch to read: these images, in this order."""

    files: list[ImageFile]
    labels: NDArray[np.int64]
    shape: tuple[int, int]
    """Height and width of the images in pixels; the shorter side is the image size."""
    crops: CropParams | None
    """None for validation."""
    indices: NDArray[np.int64]
    """(B,): indices of the images in the split."""
    copy: str = ""
    """Name of the spec's copy that is read; "" is the split itself."""


class BatchSampler:
    """Samples the batches of one shard at any position of the run."""

    def __init__(self, spec: LoaderSpec) -> None:
        check_batch_sizes(spec)
        self.spec = spec
        self.labels = np.asarray(spec.split.labels, dtype=np.int64)
        self.shuffled: tuple[int, NDArray[np.int64]] | None = None

    def batches(self, epoch: int, step: int) -> Iterator[Batch]:
        """Yield the batches from a position on, epoch after epoch without end.

        The last stage lasts for ever. Where this shard has no share of it, the epochs start again:
        back ends read ahead of what they are asked for, and nobody asks for these batches.
        """
        assert step < self.spec.steps_at(epoch), "a shard without images would never end"
        last = sum(stage.epochs for stage in self.spec.stages) - 1
        while True:
            for index in range(step, self.spec.steps_at(epoch)):
                yield self.batch(epoch, index)
            epoch, step = epoch + 1, 0
            if epoch >= last and not self.spec.steps_at(epoch):
                epoch = 0

    def batch(self, epoch: int, step: int) -> Batch:
        """Describe the batch at a position."""
        spec, stage = self.spec, self.spec.stage_at(epoch)
        if stage.rect and not spec.training:
            indices, shape = self.rectangles.batch(spec, stage, step)
        else:
            indices = self.indices(epoch, step, stage.batch_size)
            shape = stage.image_size, stage.image_size
        crops = None
        if spec.training:
            generator = Stream.CROPS.generator(spec.seed, epoch, *spec.step_and_shard(step))
            crops = draw_crops(spec, generator, len(indices), stage.min_scale)
            if spec.alternating_flip:
                crops = replace(crops, mirror=(self.first_flips[indices] + epoch) % 2)
        source = spec.source(stage.copy).files
        files = [source[index] for index in indices.tolist()]
        return Batch(files, self.labels[indices], shape, crops, indices, stage.copy)

    def indices(self, epoch: int, step: int, batch_size: int) -> NDArray[np.int64]:
        """Choose the images of a batch: (B,) indices in the split.

        Training: the epoch's permutation is cut into global batches, and each of those into a
        contiguous part for every shard.
        """
        spec = self.spec
        if not spec.training:
            own = eval_range(len(spec.split), spec.shard_id, spec.num_shards)
            return np.arange(own.start, own.stop)[step * batch_size : (step + 1) * batch_size]
        step, shard = spec.step_and_shard(step)
        start = (step * spec.num_shards * spec.accumulation + shard) * batch_size
        return self.permutation(epoch)[start : start + batch_size]

    @cached_property
    def rectangles(self) -> Rectangles:
        """The batches of validation images where a stage is `rect`."""
        split = self.spec.split
        return Rectangles(split.shapes_of(np.arange(len(split)), self.spec.upright))

    @cached_property
    def first_flips(self) -> NDArray[np.int32]:
        """(N,): 1 for each image of the split that is flipped in epoch 0 if flips alternate.

        From there on every image is flipped in every second epoch, so that any two epochs in a row
        show both sides of it (arXiv:2404.00498).
        """
        generator = Stream.FLIPS.generator(self.spec.seed)
        return generator.integers(0, 2, len(self.spec.split), np.int32)

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Shuffle the split for an epoch, alike on every shard; the latest permutation is kept."""
        if self.shuffled is None or self.shuffled[0] != epoch:
            generator = Stream.PERMUTATION.generator(self.spec.seed, epoch)
            self.shuffled = epoch, generator.permutation(len(self.spec.split))
        return self.shuffled[1]


def draw_crops(
    spec: LoaderSpec, generator: np.random.Generator, count: int, min_scale: float
) -> CropParams:
    """Draw the random numbers of `count` images."""
    low, high = np.log(spec.aspect_ratio)
    area = min_scale + (1 - min_scale) * generator.random((count, ATTEMPTS), np.float32)
    ratio = np.exp(low + (high - low) * generator.random((count, ATTEMPTS), np.float32))
    offset = generator.random((count, 2), np.float32)
    mirror = generator.integers(0, 2, count, np.int32) if spec.mirror else np.zeros(count, np.int32)
    return CropParams(area.astype(np.float32), ratio.astype(np.float32), offset, mirror)


def check_batch_sizes(spec: LoaderSpec) -> None:
    """Raise UserError if the global batch of a training stage is larger than the split."""
    if not spec.training:
        return
    shards_of_update = spec.num_shards * spec.accumulation
    for stage in spec.stages:
        if stage.batch_size * shards_of_update > len(spec.split):
            shards = f" on each of {spec.num_shards} processes" if spec.num_shards > 1 else ""
            most = len(spec.split) // shards_of_update
            raise UserError(
                f"batch_size {stage.batch_size}{shards} is too large for "
                f"{len(spec.split)} training images: at most {most}"
            )


Box = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def crop_box(
    height: ArrayLike,
    width: ArrayLike,
    crops: CropParams,
    index: int | slice,
    aspect_ratio: tuple[float, float],
) -> Box:
    """Compute (top, left, height, width) of RandomResizedCrop, in float32 as DALI does.

    `height` and `width` are those of image `index` of the batch, or arrays for a slice of it. The
    crop is the first drawn one that fits or, if none does, the largest in the centre whose aspect
    ratio is allowed.
    """
    height, width = np.asarray(height, np.int64), np.asarray(width, np.int64)
    pixels = height.astype(np.float32) * width.astype(np.float32)
    area, ratio = pixels[..., None] * crops.area[index], crops.ratio[index]
    heights = np.floor(np.sqrt(area / ratio) + np.float32(0.5))
    widths = np.floor(np.sqrt(area * ratio) + np.float32(0.5))
    fits = (heights <= height[..., None]) & (widths <= width[..., None])
    fits &= (heights > 0) & (widths > 0)
    found = fits.any(-1)
    first = fits.argmax(-1)[..., None]
    lowest, highest = aspect_ratio
    largest = (
        np.minimum(height, np.floor(width / lowest + 0.5)),
        np.minimum(width, np.floor(height * highest + 0.5)),
    )
    high, wide = (
        np.where(found, np.take_along_axis(drawn, first, -1)[..., 0], other).astype(np.int64)
        for drawn, other in zip((heights, widths), largest, strict=True)
    )
    rooms = height - high, width - wide
    top, left = (
        np.where(found, to_index(offset, room + 1), room // 2)
        for offset, room in zip(np.moveaxis(crops.offset[index], -1, 0), rooms, strict=True)
    )
    return top, left, high, wide


def to_index(offset: NDArray[np.float32], count: ArrayLike) -> NDArray[np.int64]:
    """Scale a drawn `offset` in [0, 1) to an index below `count`."""
    return np.floor(offset * np.asarray(count, np.float32)).astype(np.int64)


MULTIPLE = 8
"""The longer side is rounded down to a multiple of this, in pixels."""
MAX_RATIO = 3.0
"""Of the longer to the shorter side, so that a batch of very long images fits into memory."""


class Rectangles:
    """Batches of validation images of like aspect ratios, the same at any number of shards."""

    def __init__(self, shapes: NDArray[np.int64]) -> None:
        """`shapes` (N, 2): height and width of the images."""
        self.shapes = shapes

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(N,): indices of the images, from the tallest to the widest."""
        height, width = self.shapes.T
        return np.argsort(width / height, kind="stable")

    def batch(
        self, spec: LoaderSpec, stage: Stage, step: int
    ) -> tuple[NDArray[np.int64], tuple[int, int]]:
        """Choose a shard's batch: indices of its images, and height and width of their crops."""
        num_batches = -(-len(self.order) // stage.batch_size)
        batch = eval_range(num_batches, spec.shard_id, spec.num_shards)[step]
        indices = self.order[batch * stage.batch_size : (batch + 1) * stage.batch_size]
        short_side = resized_side(stage.image_size, spec.resize_ratio)
        return indices, crop_shape(self.shapes[indices], stage.image_size, short_side)


def crop_shape(shapes: NDArray[np.int64], image_size: int, short_side: int) -> tuple[int, int]:
    """Compute height and width of the crop that all images of a batch allow.

    `shapes` (B, 2); every image is resized so that its shorter side has `short_side` pixels. The
    crop has `image_size` times their mean aspect ratio, and never more than the resized images.
    """
    height, width = shapes.T
    ratio = float(np.mean(width / height))
    shorter = np.minimum(height, width)
    wide = ratio >= 1
    # The other side of the shortest of the resized images, rounded as torchvision does.
    most = int(np.min(short_side * (width if wide else height) // shorter))
    longer = min(image_size * min(max(ratio, 1 / ratio), MAX_RATIO), most)
    longer = max(image_size, int(longer) // MULTIPLE * MULTIPLE)
    return (image_size, longer) if wide else (longer, image_size)
