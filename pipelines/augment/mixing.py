"""Augment whole batches on the device after crop and flip, alike for all back ends.

No loop over the images, and no synchronisation with the device. Each kind of augmentation has a
random stream of its own, so that switching one on leaves the others as they are.
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
from pipelines.sampling import ATTEMPTS, Stream, to_index

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
    """Augment a training batch as `spec` says.

    images (B, 3, S, S) normalised, float32 or float16, channels_last, and so returned; labels (B,)
    int64, returned as (B, classes) float32 probabilities with mixup or cutmix. The arguments are
    not modified; they are returned themselves where there is nothing to do.
    """
    count, size = images.shape[0], images.shape[2]
    key = spec.seed, epoch, *spec.step_and_shard(step)
    if spec.auto_augment != "none" or spec.color_jitter:
        statistics = 255 * np.array([spec.mean, spec.std], np.float32)
        mean, std = on_device(images.device, *statistics)
        pixels = pixels_of(images, mean, std)
        if spec.auto_augment != "none":
            operations = draw_operations(spec, Stream.AUTO.generator(*key), count, size)
            pixels = auto_augment(pixels, *operations)
        if spec.color_jitter:
            generator = Stream.JITTER.generator(*key)
            pixels = jitter(pixels, *draw_jitter(spec.color_jitter, generator, count))
        images = normalise(pixels.permute(0, 2, 3, 1), mean, std).to(images.dtype)
    if spec.random_erasing:
        generator = Stream.ERASE.generator(*key)
        images = erase(images, draw_boxes(spec.random_erasing, generator, count, size))
    if spec.mixes:
        share, box = draw_mix(spec, Stream.MIX.generator(*key), size)
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
    """Draw the order of COLOURS for the batch, and (colours, count) factors of the images."""
    order = generator.permutation(len(COLOURS)).tolist()
    factors = generator.uniform(1 - strength, 1 + strength, (len(COLOURS), count))
    return order, factors.astype(np.float32)


def jitter(pixels: Tensor, order: list[int], factors: NDArray[np.float32]) -> Tensor:
    """Apply torchvision's ColorJitter without hue to (B, 3, S, S) float32 pixels in 0..255.

    Nothing is rounded in between, and the batch shares an order, which torchvision draws by image.
    """
    levels = on_device(pixels.device, *factors)
    for colour in order:
        pixels = COLOURS[colour](pixels, levels[colour])
    return pixels


def draw_boxes(
    probability: float, generator: np.random.Generator, count: int, size: int
) -> NDArray[np.int64]:
    """Draw the rectangle to erase from each image, as torchvision's RandomErasing does: the first
    of ATTEMPTS that fits. -> (4, count): top, bottom, left, right; empty where nothing is erased.
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
        start = to_index(generator.random(count, np.float32), size - length + 1)
        edges += [start, start + length * erased]
    return np.stack(edges)


def erase(images: Tensor, boxes: NDArray[np.int64]) -> Tensor:
    """Set normalised images to 0, the mean colour, inside `boxes` (4, B) of `draw_boxes`."""
    top, bottom, left, right = (edge[:, None] for edge in on_device(images.device, *boxes))
    pixels = images.permute(0, 2, 3, 1)
    rows = pixels.flatten(2)
    y = torch.arange(rows.shape[1], device=images.device)
    x = torch.arange(rows.shape[2], device=images.device) // 3
    inside = ((top <= y) & (y < bottom))[:, :, None] & ((left <= x) & (x < right))[:, None]
    return torch.where(inside, 0, rows).view(pixels.shape).permute(0, 3, 1, 2)


def draw_mix(
    transforms: Transforms, generator: np.random.Generator, size: int
) -> tuple[float, Box | None]:
    """Draw the share that every image of the batch keeps, and for cutmix the box that it loses."""
    both = transforms.mixup and transforms.cutmix
    cut = generator.random() < 0.5 if both else transforms.cutmix > 0
    alpha = transforms.cutmix if cut else transforms.mixup
    share = generator.beta(alpha, alpha)
    if not cut:
        return share, None
    centre, reach = generator.integers(0, size, 2), int(size * sqrt(1 - share) / 2)
    top, left = np.maximum(centre - reach, 0).tolist()
    bottom, right = np.minimum(centre + reach, size).tolist()
    return 1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right)


def mix(images: Tensor, share: float, box: Box | None) -> Tensor:
    """Blend each image with the one before it in the batch, or paste its pixels in `box`."""
    # Contiguous in this order of dimensions, which torch keeps.
    pixels = images.permute(0, 2, 3, 1)
    if box is None:
        mixed = torch.lerp(pixels.roll(1, 0), pixels, share)
    else:
        top, bottom, left, right = box
        mixed = pixels.clone()
        mixed[:, top:bottom, left:right] = pixels[:, top:bottom, left:right].roll(1, 0)
    return mixed.permute(0, 3, 1, 2)


def mix_labels(labels: Tensor, num_classes: int, share: float) -> Tensor:
    """Turn (B,) int64 labels into (B, num_classes) float32: `share` for the image's own class, the
    rest for that of the one it was mixed with."""
    own = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    return torch.lerp(own.roll(1, 0), own, share)
