"""Compare DALI with torchvision's transforms on Pillow images: pixels, and shapes of crops."""

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
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from pipelines.backends import make_loader
from pipelines.datasets.pixels import rgb
from pipelines.datasets.split import Split, undecodable
from pipelines.loader import LoaderSpec, Stage
from pipelines.sampling import Batch, BatchSampler, crop_box, draw_crops

MAX_BATCH_SIZE = 64
MIN_SCALE = 0.08
"""Smallest share of the area that a random crop keeps: the default of torchvision."""
NUM_WORST = 6
"""Images that are kept to be looked at."""
BOUNDS: dict[str, tuple[float, float | None]] = {"val": (0.25, 2), "train": (0.25, None)}
"""By split: the largest mean difference, and the largest difference of any value; of 255.

None: on a GPU, where the filter reaches over the edge of a crop, Pillow takes the pixels that are
there and DALI repeats the outermost ones. Validation cuts those edges off, training does not."""
NUM_CROPS = 10_000
SIGNIFICANCE = 1e-4
"""Smallest p-value that passes: with NUM_CROPS of each, distributions that are .032 apart."""
CROP_SPEC = LoaderSpec(split=Split([], [], ()), stages=(), training=True)
Values = NDArray[np.float64]


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
            if len(self.worst) < NUM_WORST or mean > self.worst[-1].mean:
                both = as_image(reference[index]), as_image(ours[index])
                self.worst.append(Example(name, mean, highest, *both))
                self.worst.sort(key=lambda example: -example.mean)
                del self.worst[NUM_WORST:]

    @property
    def mean(self) -> float:
        return float(np.mean(self.means))

    @property
    def percentile_99(self) -> float:
        """The 99th percentile of the images' mean differences."""
        return float(np.percentile(self.means, 99))

    @property
    def max(self) -> float:
        return float(np.max(self.maxima))

    @property
    def bounds(self) -> tuple[float, float | None]:
        return BOUNDS[self.split]

    @property
    def within(self) -> bool:
        """Whether the differences are within the bounds; NaN is not."""
        mean, highest = self.bounds
        return self.mean <= mean and (highest is None or self.max <= highest)


def compare(spec: LoaderSpec, root: Path, progress: Callable[[int], object]) -> Comparison:
    """Read the images of the first epoch of `spec` both ways; names become relative to `root`.

    `progress` is called with the number of images that have been compared since.

    Raises UserError for a file that cannot be decoded.
    """
    found = Comparison("train" if spec.training else "val", spec.stages[0].image_size)
    sampler = BatchSampler(spec)
    with closing(make_loader("dali", spec)) as loader, ThreadPoolExecutor(spec.num_threads) as pool:
        for step, (images, _) in enumerate(loader):
            batch = sampler.batch(0, step)
            names = [os.path.relpath(str(file), root) for file in batch.files]
            expected = pool.map(partial(reference, spec, batch), range(len(names)))
            found.add(names, pixels(spec, images), torch.stack(list(expected)))
            progress(len(names))
    return found


def spec_of(
    split: Split, training: bool, image_size: int, device: str, num_threads: int
) -> LoaderSpec:
    """Make the spec that `compare` reads: full batches, so that training leaves no image out."""
    batch_size = next(size for size in range(MAX_BATCH_SIZE, 0, -1) if len(split) % size == 0)
    stage = Stage(epochs=1, image_size=image_size, batch_size=batch_size, min_scale=MIN_SCALE)
    return LoaderSpec(
        split=split, stages=(stage,), training=training, device=device, num_threads=num_threads
    )


def pixels(spec: LoaderSpec, images: Tensor) -> Tensor:
    """Undo normalisation: values in 0..255 on the CPU, rid of float32's rounding errors."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (spec.mean, spec.std))
    return (255 * (images.cpu().float() * std + mean)).round(decimals=3)


def reference(spec: LoaderSpec, batch: Batch, index: int) -> Tensor:
    """Transform an image of the batch with torchvision: (3, S, S) uint8."""
    file, size = batch.files[index], min(batch.shape)
    try:
        with file.open() as stream, Image.open(stream) as opened:
            image = rgb(opened, spec.upright)
    except Exception as error:
        raise undecodable(file, error) from error
    if batch.crops is None:
        view = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        image = transforms.Compose(view)(image)
    else:
        box = crop_box(image.height, image.width, batch.crops, index, spec.aspect_ratio)
        edges = [edge.item() for edge in box]
        image = functional.resized_crop(image, *edges, [size, size], antialias=True)
        if batch.crops.mirror[index]:
            image = functional.hflip(image)
    return functional.pil_to_tensor(image)


def as_image(values: Tensor) -> Image.Image:
    """(3, S, S), values in 0..255, as an image."""
    return functional.to_pil_image(values.round().clamp(0, 255).to(torch.uint8))


@dataclass(frozen=True)
class CropTest:
    """How far apart the random crops of both lie for images of one shape."""

    height: int
    width: int
    distances: dict[str, tuple[float, float]]
    """Of the crop's "area" as a share of the image's and of its "aspect" ratio: the largest
    difference between the two distribution functions, and its p-value."""

    @property
    def within(self) -> bool:
        return all(p >= SIGNIFICANCE for _, p in self.distances.values())


def typical_shapes(split: Split) -> list[tuple[int, int]]:
    """The (height, width) of the narrowest, the median and the widest image, without repeats."""
    assert split.shapes is not None, "a split whose files were not looked at"
    shapes = split.shapes[np.argsort(split.shapes[:, 1] / split.shapes[:, 0], kind="stable")]
    chosen = shapes[[0, len(shapes) // 2, -1]].tolist()
    return list(dict.fromkeys((height, width) for height, width in chosen))


def crop_test(height: int, width: int, seed: int = 0) -> CropTest:
    """Test whether NUM_CROPS crops drawn both ways from images of this shape are alike."""
    ours = our_crops(height, width, seed)
    theirs = torchvision_crops(height, width, seed)
    distances = {
        "area": kolmogorov_smirnov(*(high * wide for high, wide in (ours, theirs))),
        "aspect": kolmogorov_smirnov(*(wide / high for high, wide in (ours, theirs))),
    }
    return CropTest(height, width, distances)


def our_crops(height: int, width: int, seed: int) -> tuple[Values, Values]:
    """Heights and widths of crops as every back end cuts them."""
    crops = draw_crops(CROP_SPEC, np.random.default_rng(seed), NUM_CROPS, MIN_SCALE)
    _, _, high, wide = crop_box(height, width, crops, slice(None), CROP_SPEC.aspect_ratio)
    return high.astype(np.float64), wide.astype(np.float64)


def torchvision_crops(height: int, width: int, seed: int) -> tuple[Values, Values]:
    """Heights and widths of crops as torchvision draws them."""
    image = torch.empty((3, height, width), device="meta")  # only its shape is asked for
    scale, ratio = [MIN_SCALE, 1.0], list(CROP_SPEC.aspect_ratio)
    draw = transforms.RandomResizedCrop.get_params
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        boxes = [draw(image, scale, ratio) for _ in range(NUM_CROPS)]
    _, _, high, wide = np.array(boxes, np.float64).T
    return high, wide


def kolmogorov_smirnov(first: Values, second: Values) -> tuple[float, float]:
    """The two-sample test: the largest distance D of the distribution functions, and its p-value.

    p = 2 sum over k = 1, 2, ... of (-1)^(k-1) exp(-2 k^2 x^2), x = D sqrt(n m / (n + m)): the limit
    for large samples (Smirnov 1948, "Table for estimating the goodness of fit of empirical
    distributions"). Equal values, as whole pixels give, make p larger than it is.
    """
    both = np.concatenate((first, second))
    shares = [
        np.searchsorted(np.sort(values), both, side="right") / len(values)
        for values in (first, second)
    ]
    distance = float(np.abs(shares[0] - shares[1]).max())
    x = distance * np.sqrt(len(first) * len(second) / len(both))
    if x < 0.2:  # the series converges slowly, p is 1 to 12 digits
        return distance, 1.0
    k = np.arange(1, 101)
    p = 2 * np.sum((-1.0) ** (k - 1) * np.exp(-2 * (k * x) ** 2))
    return distance, float(np.clip(p, 0, 1))
