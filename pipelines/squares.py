"""The images of a split as squares of fixed sizes, made in processes where there are many."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from pipelines.images import ImageFile
from pipelines.split import Split, undecodable
from pipelines.torchvision import decode, padded, validation_crop
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
