"""Random crops against those of torchvision's RandomResizedCrop: are both drawn alike?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import RandomResizedCrop

from pipelines.datasets.split import Split
from pipelines.loader import LoaderSpec
from pipelines.parity.compare import MIN_SCALE
from pipelines.sampling import crop_box, draw

DRAWS = 10_000
SIGNIFICANCE = 1e-4
"""Smallest p-value that passes: with DRAWS of each, distributions that are .032 apart."""
SPEC = LoaderSpec(split=Split([], [], ()), stages=(), training=True)
Values = NDArray[np.float64]


@dataclass(frozen=True)
class CropTest:
    """How far apart the crops of both lie for images of one shape."""

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
    """Draw DRAWS crops both ways from images of this shape."""
    ours = our_crops(height, width, seed)
    theirs = torchvision_crops(height, width, seed)
    distances = {
        "area": kolmogorov_smirnov(*(high * wide for high, wide in (ours, theirs))),
        "aspect": kolmogorov_smirnov(*(wide / high for high, wide in (ours, theirs))),
    }
    return CropTest(height, width, distances)


def our_crops(height: int, width: int, seed: int) -> tuple[Values, Values]:
    """Heights and widths of crops as every back end cuts them."""
    draws = draw(SPEC, np.random.default_rng(seed), DRAWS, MIN_SCALE)
    _, _, high, wide = crop_box(height, width, draws, slice(None), SPEC.aspect_ratio)
    return high.astype(np.float64), wide.astype(np.float64)


def torchvision_crops(height: int, width: int, seed: int) -> tuple[Values, Values]:
    image = torch.empty((3, height, width), device="meta")  # only its shape is asked for
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        boxes = [
            RandomResizedCrop.get_params(image, [MIN_SCALE, 1.0], list(SPEC.aspect_ratio))
            for _ in range(DRAWS)
        ]
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
