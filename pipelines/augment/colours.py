"""Change colours and geometry of whole batches as torchvision does, each image by its own level.

Everywhere pixels are (B, 3, H, W) float32 in 0..255 and `level` is (B,) float32 on their device.
The results are new tensors, and fractions are kept where torchvision truncates to uint8.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from pipelines.augment.crops import on_device
from pipelines.loader import MAGNITUDES, Transforms

GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue: ITU-R BT.601, with torchvision's digits."""


def brightness(pixels: Tensor, level: Tensor) -> Tensor:
    """Multiply by `level`."""
    return (pixels * level[:, None, None, None]).clamp_(0, 255)


def contrast(pixels: Tensor, level: Tensor) -> Tensor:
    """Blend with the image's mean grey for a level below 1, move away from it above."""
    return blend(grey(pixels).mean((1, 2, 3), keepdim=True), pixels, level)


def saturation(pixels: Tensor, level: Tensor) -> Tensor:
    """Blend with the grey image for a level below 1, move away from it above."""
    return blend(grey(pixels), pixels, level)


def sharpness(pixels: Tensor, level: Tensor) -> Tensor:
    """Blend with a blurred image for a level below 1, move away from it above; the border stays."""
    inner = pixels[..., 1:-1, 1:-1]
    # The kernel is ones around a five, over 13. A GPU would compute a convolution in TF32.
    blurred = (9 * avg_pool2d(pixels, 3, stride=1) + 4 * inner) / 13
    sharpened = pixels.clone()
    sharpened[..., 1:-1, 1:-1] = blend(blurred, inner, level)
    return sharpened


def posterize(pixels: Tensor, level: Tensor) -> Tensor:
    """Round down to multiples of `level`, a power of two."""
    return (pixels / level[:, None, None, None]).floor_() * level[:, None, None, None]


def solarize(pixels: Tensor, level: Tensor) -> Tensor:
    """Invert values from `level` up."""
    return torch.where(pixels >= level[:, None, None, None], 255 - pixels, pixels)


def auto_contrast(pixels: Tensor, level: Tensor) -> Tensor:
    """Stretch every channel to 0..255, unless it has one value only."""
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (pixels - low) * 255 / span.clamp(min=1), pixels)


def equalize(pixels: Tensor, level: Tensor) -> Tensor:
    """Flatten every channel's histogram by Pillow's rule; the pixels are whole numbers.

    With s = (pixels of other values than the largest) // 255, a value that n pixels are below
    becomes (n + s // 2) // s; a channel with s = 0 stays as it is.
    """
    values = pixels.long().flatten(2)
    counts = values.new_zeros((*values.shape[:2], 256))
    counts.scatter_add_(2, values, values.new_ones(()).expand_as(values))
    largest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - largest) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=pixels.device))
    return table.gather(2, values).view(pixels.shape).float()


def shear_x(pixels: Tensor, level: Tensor) -> Tensor:
    """Move rows left by `level` times their distance from the top edge."""
    x, y = coordinates(pixels)
    return warp(pixels, x + level[:, None, None] * (y + pixels.shape[2] / 2), y)


def shear_y(pixels: Tensor, level: Tensor) -> Tensor:
    """Move columns up by `level` times their distance from the left edge."""
    x, y = coordinates(pixels)
    return warp(pixels, x, y + level[:, None, None] * (x + pixels.shape[3] / 2))


def translate_x(pixels: Tensor, level: Tensor) -> Tensor:
    """Move right by `level` pixels."""
    x, y = coordinates(pixels)
    return warp(pixels, x - level[:, None, None], y)


def translate_y(pixels: Tensor, level: Tensor) -> Tensor:
    """Move down by `level` pixels."""
    x, y = coordinates(pixels)
    return warp(pixels, x, y - level[:, None, None])


def rotate(pixels: Tensor, level: Tensor) -> Tensor:
    """Rotate about the centre by `level` degrees, counter-clockwise."""
    x, y = coordinates(pixels)
    angle = level[:, None, None] * (pi / 180)
    return warp(pixels, angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y)


def grey(pixels: Tensor) -> Tensor:
    """Compute the perceived brightness, (B, 1, H, W)."""
    red, green, blue = pixels.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]


def blend(other: Tensor, pixels: Tensor, level: Tensor) -> Tensor:
    """Compute level * pixels + (1 - level) * other, clamped to 0..255."""
    return torch.lerp(other, pixels, level[:, None, None, None]).clamp_(0, 255)


def coordinates(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute x (W,) and y (H, 1) of the pixels, relative to the image's centre."""
    height, width = pixels.shape[2:]
    x = torch.arange(width, device=pixels.device) - (width - 1) / 2
    y = torch.arange(height, device=pixels.device) - (height - 1) / 2
    return x, y[:, None]


def warp(pixels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sample every pixel at (x, y), interpolated linearly and rounded; black outside.

    x and y can be broadcast to (B, H, W), in pixels from the centre.
    """
    height, width = pixels.shape[2:]
    shape = (len(pixels), height, width)
    grid = torch.stack(((2 / width * x).expand(shape), (2 / height * y).expand(shape)), -1)
    return grid_sample(pixels, grid, mode="bilinear", align_corners=False).round_()


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "identity": None,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
    "brightness": brightness,
    "saturation": saturation,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
}


def level_table(policy: str, size: int) -> NDArray[np.float32]:
    """Tabulate the levels of images `size` pixels wide: (operations, 2 signs, MAGNITUDES).

    `policy` is "trivial" (Mueller and Hutter 2021, the wide space) or "rand" (Cubuk et al. 2019).
    """
    part = np.linspace(0, 1, MAGNITUDES)
    signed = np.stack([part, -part])
    if policy == "trivial":
        shear, pixels, degrees, change, bits = 0.99, 32.0, 135, 0.99, 6
    else:
        shear, pixels, degrees, change, bits = 0.3, 150 / 331 * size, 30, 0.9, 4
    levels = (
        dict.fromkeys(("shear_x", "shear_y"), shear * signed)
        | dict.fromkeys(("translate_x", "translate_y"), np.trunc(pixels * signed))
        | {"rotate": degrees * signed}
        | dict.fromkeys(("brightness", "saturation", "contrast", "sharpness"), 1 + change * signed)
        | {"posterize": 2 ** np.rint(bits * part), "solarize": 255 * (1 - part)}
    )
    rows = [np.broadcast_to(levels.get(name, 0), signed.shape) for name in OPERATIONS]
    return np.stack(rows).astype(np.float32)


def draw_operations(
    transforms: Transforms, generator: np.random.Generator, count: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draw indices in OPERATIONS and levels, (rounds, count), of images `size` pixels wide.

    With "trivial" every image has a magnitude of its own, with "rand" all have the same.
    """
    policy = transforms.auto_augment
    rounds, magnitude = transforms.rand_augment if policy == "rand" else (1, None)
    operations = generator.integers(0, len(OPERATIONS), (rounds, count))
    signs = generator.integers(0, 2, (rounds, count))
    magnitudes = generator.integers(0, MAGNITUDES, (rounds, count))
    if magnitude is not None:
        magnitudes[:] = magnitude
    return operations, level_table(policy, size)[operations, signs, magnitudes]


def auto_augment(
    pixels: Tensor, operations: NDArray[np.int64], levels: NDArray[np.float32]
) -> Tensor:
    """Apply rounds of operations from `draw_operations`; the result is whole numbers.

    pixels (B, 3, S, S) float32, on any device: rounded, and overwritten. No loop over the images,
    and no synchronisation. Results are truncated to whole numbers after each round as by
    torchvision on uint8 images, and differ from its by 1 at most where it rounds in between.
    """
    pixels.round_().clamp_(0, 255)
    for chosen, strengths in zip(operations, levels, strict=True):
        order = np.argsort(chosen, kind="stable")
        counts = np.bincount(chosen, minlength=len(OPERATIONS)).tolist()
        (rows,) = on_device(pixels.device, order)
        (strength,) = on_device(pixels.device, strengths[order])
        parts = zip(OPERATIONS.values(), rows.split(counts), strength.split(counts), strict=True)
        for operation, part, level in parts:
            if operation is not None and len(part):
                changed = operation(pixels.index_select(0, part), level)
                pixels.index_copy_(0, part, changed.floor_())
    return pixels
