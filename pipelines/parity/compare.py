"""The pixels of the dali back end against those of torchvision's transforms on Pillow images."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from pipelines.backends import make_loader
from pipelines.datasets.split import Split, undecodable
from pipelines.loader import LoaderSpec, Stage
from pipelines.sampling import Batch, Order, crop_box

MAX_BATCH_SIZE = 64
MIN_SCALE = 0.08
"""Smallest share of the area that a random crop keeps: the default of torchvision."""
WORST = 6
"""Images that are kept to be looked at."""
BOUNDS: dict[str, tuple[float, float | None]] = {"val": (0.25, 2), "train": (0.25, None)}
"""By split: the largest mean difference, and the largest difference of any value; of 255.

None: on a GPU, where the filter reaches over the edge of a crop, Pillow takes the pixels that are
there and DALI repeats the outermost ones. Validation cuts those edges off, training does not."""


@dataclass(frozen=True)
class Example:
    """One image both ways, and how far its values differ, of 255."""

    name: str
    mean: float
    max: float
    reference: Image.Image
    ours: Image.Image


@dataclass
class Comparison:
    """One split at one image size; differences are absolute ones of values in 0..255."""

    split: str
    """Its name, "train" or "val"."""
    image_size: int
    names: list[str] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    """The mean difference of each image."""
    maxima: list[float] = field(default_factory=list)
    """The largest difference of each image."""
    max_inside: float = 0.0
    """The largest difference of all, the outermost row and column on each side left out."""
    worst: list[Example] = field(default_factory=list)
    """The images of the largest means, the largest first."""

    def add(self, names: list[str], ours: Tensor, reference: Tensor) -> None:
        """Compare some images: both (B, 3, S, S), values in 0..255."""
        differences = (ours - reference).abs()
        means = differences.mean((1, 2, 3), dtype=torch.float64).tolist()
        maxima = differences.amax((1, 2, 3)).tolist()
        differences[..., [0, -1], :] = differences[..., [0, -1]] = 0
        self.max_inside = max(self.max_inside, differences.max().item())
        self.names += names
        self.means += means
        self.maxima += maxima
        for index, (name, mean, highest) in enumerate(zip(names, means, maxima, strict=True)):
            if len(self.worst) < WORST or mean > self.worst[-1].mean:
                both = as_image(reference[index]), as_image(ours[index])
                self.worst.append(Example(name, mean, highest, *both))
                self.worst.sort(key=lambda example: -example.mean)
                del self.worst[WORST:]

    @property
    def mean(self) -> float:
        return float(np.mean(self.means))

    @property
    def percentile_99(self) -> float:
        """Of the mean differences of the images."""
        return float(np.percentile(self.means, 99))

    @property
    def max(self) -> float:
        return float(np.max(self.maxima))

    @property
    def within(self) -> bool:
        """Whether the differences are within BOUNDS; NaN is not."""
        mean, highest = BOUNDS[self.split]
        return self.mean <= mean and (highest is None or self.max <= highest)


def spec_of(
    split: Split, training: bool, image_size: int, device: str, num_threads: int
) -> LoaderSpec:
    """What `compare` reads: one epoch, in full batches so that training leaves no image out."""
    number = len(split)
    batch_size = next(size for size in range(MAX_BATCH_SIZE, 0, -1) if number % size == 0)
    stage = Stage(epochs=1, image_size=image_size, batch_size=batch_size, min_scale=MIN_SCALE)
    return LoaderSpec(
        split=split, stages=(stage,), training=training, device=device, num_threads=num_threads
    )


def compare(spec: LoaderSpec, root: Path, progress: Callable[[int], object]) -> Comparison:
    """Read the images of the first epoch of `spec` both ways; names become relative to `root`.

    `progress` is called with the number of images that have been compared since.

    Raises UserError for a file that cannot be decoded.
    """
    found = Comparison("train" if spec.training else "val", spec.stages[0].image_size)
    order = Order(spec)
    with closing(make_loader("dali", spec)) as loader, ThreadPoolExecutor(spec.num_threads) as pool:
        for step, (images, _) in enumerate(loader):
            batch = order.batch(0, step)
            names = [os.path.relpath(str(file), root) for file in batch.files]
            expected = pool.map(partial(reference, spec, batch), range(len(names)))
            found.add(names, pixels(spec, images), torch.stack(list(expected)))
            progress(len(names))
    return found


def pixels(spec: LoaderSpec, images: Tensor) -> Tensor:
    """Normalised images as values in 0..255, on the CPU, without float32's rounding errors."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (spec.mean, spec.std))
    return (255 * (images.cpu().float() * std + mean)).round(decimals=3)


def reference(spec: LoaderSpec, batch: Batch, index: int) -> Tensor:
    """What torchvision makes of an image of the batch: (3, S, S) uint8."""
    file, size = batch.files[index], min(batch.shape)
    try:
        with file.open() as stream:
            image = Image.open(stream).convert("RGB")
    except Exception as error:
        raise undecodable(file, error) from error
    if batch.draws is None:
        view = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        image = transforms.Compose(view)(image)
    else:
        box = crop_box(image.height, image.width, batch.draws, index, spec.aspect_ratio)
        edges = [edge.item() for edge in box]
        image = functional.resized_crop(image, *edges, [size, size], antialias=True)
        if batch.draws.mirror[index]:
            image = functional.hflip(image)
    return functional.pil_to_tensor(image)


def as_image(values: Tensor) -> Image.Image:
    """(3, S, S), values in 0..255, as an image."""
    return functional.to_pil_image(values.round().clamp(0, 255).to(torch.uint8))
