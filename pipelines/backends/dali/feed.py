"""Make what the DALI pipeline is fed with: files, and where each image is cut and resized.

A batch is described by few arrays, computed by numpy for all of its images at once: a value at a
time, Python and DALI's small operators took longer than reading the files.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.backend import TensorCPU
from nvidia.dali.data_node import DataNode

from pipelines.datasets.images import ImageFile
from pipelines.datasets.pixels import (
    COLUMNS_REVERSED,
    ROWS_REVERSED,
    SIDEWAYS,
    Pairs,
    stored_windows,
    swapped,
)
from pipelines.datasets.split import undecodable
from pipelines.loader import LoaderSpec, resized_side
from pipelines.sampling import Batch, crop_box

Files = NDArray[np.uint8] | list[TensorCPU]
"""Paths (B, L), filled up with zeros; or encoded images."""
PIECES = 4
"""Per thread and batch: so few that handing them out costs nothing, and enough to be shared evenly
where images differ."""


@dataclass(frozen=True)
class Fed:
    """A batch in flight, and how each of its images becomes one of the batch."""

    batch: Batch
    shapes: Pairs
    """Height and width of the encoded images."""
    orientations: NDArray[np.int8]
    """(B,): the EXIF orientation by which what is decoded is turned upright; 1: it is not."""
    start: Pairs | None
    """Where the window begins that is decoded, in the encoded image; None: whole images are."""
    extent: Pairs | None
    """Height and width of the window."""
    size: Pairs
    """Height and width that the image is then resized to."""
    corner: Pairs
    """Where the batch's image begins in the resized one."""

    @classmethod
    def of(cls, spec: LoaderSpec, batch: Batch) -> Fed:
        """Compute a batch of `spec`. Raises UserError for an image whose header cannot be read."""
        shapes, orientations = spec.source(batch.copy).headers_of(batch.indices)
        if not spec.upright:
            orientations = np.ones_like(orientations)
        seen, count = swapped(shapes, orientations), len(shapes)
        size, corner = np.full((count, 2), batch.shape), np.zeros((count, 2), np.int64)
        start = extent = None
        if not spec.training:
            short = resized_side(min(batch.shape), spec.resize_ratio)
            size = short * seen // seen.min(1, keepdims=True)  # torchvision rounds down
            corner = np.rint((size - batch.shape) / 2).astype(np.int64)
        elif not spec.reflect_pad:
            assert batch.crops is not None
            height, width = seen.T
            box = crop_box(height, width, batch.crops, slice(None), spec.aspect_ratio)
            window = np.stack(box[:2], 1), np.stack(box[2:], 1)
            start, extent = stored_windows(*window, shapes, orientations)
        return cls(batch, shapes, orientations, start, extent, size, corner)

    @property
    def mirror(self) -> NDArray[np.int32]:
        """(B,): 1 where the image is flipped left-right. `reflect_crop` flips by itself."""
        if self.start is None or self.batch.crops is None:
            return np.zeros(len(self.shapes), np.int32)
        return self.batch.crops.mirror

    @property
    def turns(self) -> NDArray[np.float32]:
        """(B, 2, 3): for each image the affine map from the pixels of the upright image, x before
        y, to those of the decoded one."""
        extent = self.shapes if self.extent is None else self.extent
        turns = np.zeros((len(extent), 2, 3), np.float32)
        for axis, reverse in enumerate((COLUMNS_REVERSED, ROWS_REVERSED)):
            is_reversed = reverse[self.orientations]
            source = np.where(SIDEWAYS[self.orientations], 1 - axis, axis)
            turns[np.arange(len(extent)), axis, source] = np.where(is_reversed, -1, 1)
            turns[:, axis, 2] = np.where(is_reversed, extent[:, 1 - axis], 0)
        return turns


class Feed:
    """Feeds the pipeline, and remembers the batches in flight."""

    def __init__(
        self, spec: LoaderSpec, batches: Iterator[tuple[Batch, Files]], finish: bool
    ) -> None:
        """`finish`: the pipeline resizes and normalises, too, and returns labels."""
        self.spec, self.batches, self.finish = spec, batches, finish
        self.in_flight: deque[Fed] = deque()
        integers, floats, scalars = (types.INT32, 1), (types.FLOAT, 1), (types.FLOAT, 0)
        kinds = {"files": (types.UINT8, 1), "height": integers, "width": integers}
        if spec.training and not spec.reflect_pad:
            kinds |= {"start": integers, "extent": integers}
        if finish:
            kinds |= {"labels": (types.INT64, 0), "size": floats, "mirror": (types.INT32, 0)}
            if spec.upright:
                kinds |= {"turns": (types.FLOAT, 2), "turned": floats}
            kinds |= dict.fromkeys(("crop_h", "crop_w", "crop_pos_y", "crop_pos_x"), scalars)
        self.kinds = kinds
        """By name of the input: type and number of dimensions, without that of the batch."""

    def nodes(self) -> dict[str, DataNode]:
        """Define the pipeline's inputs, by name."""
        dtypes, dimensions = zip(*self.kinds.values(), strict=True)
        nodes = fn.external_source(
            source=self,
            num_outputs=len(self.kinds),
            batch=True,
            dtype=list(dtypes),
            ndim=list(dimensions),
        )
        return dict(zip(self.kinds, nodes, strict=True))

    def __call__(self) -> list[Any]:
        """Return the values of the next batch, in the order of `nodes`."""
        batch, files = next(self.batches)
        fed = Fed.of(self.spec, batch)
        self.in_flight.append(fed)
        values = {"files": files} | self.numbers(fed)
        return [values[name] for name in self.kinds]

    def numbers(self, fed: Fed) -> dict[str, NDArray[Any]]:
        """Return the values of a batch but for its files, by name of the input."""
        shapes = fed.shapes.astype(np.int32)
        values: dict[str, NDArray[Any]] = {"height": shapes[:, :1], "width": shapes[:, 1:]}
        if fed.start is not None and fed.extent is not None:
            values |= {"start": fed.start.astype(np.int32), "extent": fed.extent.astype(np.int32)}
        if self.finish:
            # DALI takes the start of a crop as a share of the room, and truncates: the quarters of
            # a pixel keep rounding errors from moving it, and avoid 0 / 0.
            share = ((fed.corner + 0.25) / (fed.size - fed.batch.shape + 0.25)).astype(np.float32)
            crop = np.tile(np.array(fed.batch.shape, np.float32)[:, None], len(shapes))
            values |= {"labels": fed.batch.labels, "size": fed.size.astype(np.float32)}
            values |= {"mirror": fed.mirror, "crop_h": crop[0], "crop_w": crop[1]}
            values |= {"crop_pos_y": share[:, 0], "crop_pos_x": share[:, 1]}
            decoded = fed.shapes if fed.extent is None else fed.extent
            turned = swapped(decoded, fed.orientations).astype(np.float32)
            values |= {"turns": fed.turns, "turned": turned}
        return {name: np.ascontiguousarray(value) for name, value in values.items()}


def pieces(count: int, num_threads: int) -> list[slice]:
    """Divide a batch of `count` images into pieces for threads."""
    size = -(-count // (PIECES * max(1, num_threads)))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def with_paths(batches: Iterator[Batch]) -> Generator[tuple[Batch, Files]]:
    """Pair batches with the paths of their files."""
    for batch in batches:
        paths = np.array([os.fsencode(file.path) for file in batch.files])
        yield batch, paths.view(np.uint8).reshape(len(paths), -1)


def with_bytes(batches: Iterator[Batch], num_threads: int) -> Generator[tuple[Batch, Files]]:
    """Pair batches with their encoded images, read one batch ahead.

    Raises UserError that names an image that cannot be read.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        reading: deque[tuple[Batch, list[Future[list[TensorCPU]]]]] = deque()
        for batch in batches:
            parts = pieces(len(batch.files), num_threads)
            reading.append((batch, [pool.submit(read, batch.files[part]) for part in parts]))
            if len(reading) == 1:
                continue
            batch, jobs = reading.popleft()
            yield batch, [encoded for job in jobs for encoded in job.result()]


def read(files: Sequence[ImageFile]) -> list[TensorCPU]:
    """Read encoded images as DALI takes them. Raises UserError for one that cannot be read."""
    encoded = []
    for file in files:
        try:
            encoded.append(TensorCPU(np.frombuffer(file.read(), np.uint8)))
        except (OSError, EOFError) as error:
            raise undecodable(file, error) from error
    return encoded
