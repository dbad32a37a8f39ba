"""The augmentation that all back ends share: whole batches on the device, after crop and flip.

No loop over the images, and nothing waits for the device. As in `pipelines.order`, all random
numbers follow from (seed, epoch, step, shard) alone; each kind has a generator of its own, so that
switching one on leaves the others as they are.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import colours as pixel_ops
from pipelines.augment.colours import auto_augment, draw_operations
from pipelines.augment.crops import normalise, on_device
from pipelines.loader import LoaderSpec, Transforms
from pipelines.sampling import ATTEMPTS, place

AUTO, JITTER, ERASE, MIX = 3, 4, 5, 6
"""First words of the keys, beside those of `pipelines.order`."""
ERASED_AREA = (0.02, 0.33)
"""Share of the image; this and the ratio are the defaults of torchvision's RandomErasing."""
ERASED_RATIO = (0.3, 3.3)
"""Height / width."""
COLOURS = (pixel_ops.brightness, pixel_ops.contrast, pixel_ops.saturation)
Box = tuple[int, int, int, int]
"""Top, bottom, left, right."""


def augment(
    images: Tensor, labels: Tensor, spec: LoaderSpec, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """A training batch as `spec` wants it.

    images (B, 3, S, S) normalised, float32 or float16, channels_last, and so returned; labels (B,)
    int64, returned as (B, classes) float32 probabilities with mixup or cutmix. The arguments are
    not changed, and are returned themselves where nothing is asked for.
    """
    wanted, count, size = spec, images.shape[0], images.shape[2]

    def generator(word: int) -> np.random.Generator:
        return np.random.default_rng((word, spec.seed, epoch, *spec.place(step)))

    if wanted.auto_augment != "none" or wanted.color_jitter:
        statistics = 255 * np.array([spec.mean, spec.std], np.float32)
        mean, std = on_device(images.device, *statistics)
        pixels = pixels_of(images, mean, std)
        if wanted.auto_augment != "none":
            operations = draw_operations(wanted, generator(AUTO), count, size)
            pixels = auto_augment(pixels, *operations)
        if wanted.color_jitter:
            pixels = jitter(pixels, *draw_jitter(wanted.color_jitter, generator(JITTER), count))
        images = normalise(pixels.permute(0, 2, 3, 1), mean, std).to(images.dtype)
    if wanted.random_erasing:
        images = erase(images, draw_boxes(wanted.random_erasing, generator(ERASE), count, size))
    if wanted.mixes:
        share, box = draw_mix(wanted, generator(MIX), size)
        images = mix(images, share, box)
        labels = mix_labels(labels, len(spec.split.classes), share)
    return images, labels


def pixels_of(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo `normalise`: (B, 3, S, S) float32, contiguous, in the units of mean and std (3,)."""
    # Planes: on a CPU colours are several times faster to mix in them than in channels_last.
    planes = images.float().contiguous()
    return torch.addcmul(mean[:, None, None], planes, std[:, None, None])


def draw_jitter(
    strength: float, generator: np.random.Generator, count: int
) -> tuple[list[int], NDArray[np.float32]]:
    """The order of COLOURS, for the batch, and (colours, count) factors of the images."""
    order = generator.permutation(len(COLOURS)).tolist()
    factors = generator.uniform(1 - strength, 1 + strength, (len(COLOURS), count))
    return order, factors.astype(np.float32)


def jitter(pixels: Tensor, order: list[int], factors: NDArray[np.float32]) -> Tensor:
    """torchvision's ColorJitter without hue, of (B, 3, S, S) float32 pixels in 0..255.

    Not rounded in between, and the order is the batch's where torchvision draws it by image.
    """
    levels = on_device(pixels.device, *factors)
    for colour in order:
        pixels = COLOURS[colour](pixels, levels[colour])
    return pixels


def draw_boxes(
    probability: float, generator: np.random.Generator, count: int, size: int
) -> NDArray[np.int64]:
    """(4, count): top, bottom, left, right of what is erased of each image; empty where nothing.

    As torchvision's RandomErasing: the first of ATTEMPTS rectangles that fits.
    """
    shape = (count, ATTEMPTS)
    area = size**2 * generator.uniform(*ERASED_AREA, shape)
    lowest, highest = np.log(ERASED_RATIO)
    ratio = np.exp(generator.uniform(lowest, highest, shape))
    heights, widths = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (heights < size) & (widths < size)
    first = fits.argmax(1)[:, None]
    erased = fits.any(1) & (generator.random(count) < probability)
    edges = []
    for lengths in (heights, widths):
        length = np.take_along_axis(lengths, first, 1)[:, 0].astype(np.int64)
        start = place(generator.random(count, np.float32), size - length + 1)
        edges += [start, start + length * erased]
    return np.stack(edges)


def erase(images: Tensor, boxes: NDArray[np.int64]) -> Tensor:
    """Normalised images with 0, the mean colour, in the boxes (top, bottom, left, right; B)."""
    top, bottom, left, right = (edge[:, None] for edge in on_device(images.device, *boxes))
    pixels = images.permute(0, 2, 3, 1)
    rows = pixels.flatten(2)
    y = torch.arange(rows.shape[1], device=images.device)
    x = torch.arange(rows.shape[2], device=images.device) // 3
    inside = ((top <= y) & (y < bottom))[:, :, None] & ((left <= x) & (x < right))[:, None]
    return torch.where(inside, 0, rows).view(pixels.shape).permute(0, 3, 1, 2)


def draw_mix(
    wanted: Transforms, generator: np.random.Generator, size: int
) -> tuple[float, Box | None]:
    """The share that every image of the batch keeps, and with cutmix the box that it loses."""
    cut = generator.random() < 0.5 if wanted.mixup and wanted.cutmix else wanted.cutmix > 0
    alpha = wanted.cutmix if cut else wanted.mixup
    share = generator.beta(alpha, alpha)
    if not cut:
        return share, None
    centre, reach = generator.integers(0, size, 2), int(size * sqrt(1 - share) / 2)
    top, left = np.maximum(centre - reach, 0).tolist()
    bottom, right = np.minimum(centre + reach, size).tolist()
    return 1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right)


def mix(images: Tensor, share: float, box: Box | None) -> Tensor:
    """Each image mixed with the one before it in the batch, or with that one's pixels in `box`."""
    # In this order of dimensions they are contiguous: torch keeps it that way.
    pixels = images.permute(0, 2, 3, 1)
    if box is None:
        mixed = torch.lerp(pixels.roll(1, 0), pixels, share)
    else:
        top, bottom, left, right = box
        mixed = pixels.clone()
        mixed[:, top:bottom, left:right] = pixels[:, top:bottom, left:right].roll(1, 0)
    return mixed.permute(0, 3, 1, 2)


def mix_labels(labels: Tensor, num_classes: int, share: float) -> Tensor:
    """(B,) int64 to (B, num_classes) float32: `share` for the own class, the rest as in `mix`."""
    own = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    return torch.lerp(own.roll(1, 0), own, share)
