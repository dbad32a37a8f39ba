"""TrivialAugment and RandAugment on whole batches: one image, one operation, one strength.

The operations, their ranges and the interpolation are those that torchvision's reference training
gives TrivialAugmentWide and RandAugment. DALI has both, too, but with random numbers of its own
and other ranges: here all back ends share one implementation, as exact on resume as the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines import pixel_ops
from pipelines.augmentation import MAGNITUDES, Augmentation
from pipelines.batch_crop import on_device

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "identity": None,
    "shear_x": pixel_ops.shear_x,
    "shear_y": pixel_ops.shear_y,
    "translate_x": pixel_ops.translate_x,
    "translate_y": pixel_ops.translate_y,
    "rotate": pixel_ops.rotate,
    "brightness": pixel_ops.brightness,
    "saturation": pixel_ops.saturation,
    "contrast": pixel_ops.contrast,
    "sharpness": pixel_ops.sharpness,
    "posterize": pixel_ops.posterize,
    "solarize": pixel_ops.solarize,
    "auto_contrast": pixel_ops.auto_contrast,
    "equalize": pixel_ops.equalize,
}


def level_table(policy: str, size: int) -> NDArray[np.float32]:
    """(operations, 2 signs, MAGNITUDES): what each is called with on images `size` pixels wide.

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
    wanted: Augmentation, generator: np.random.Generator, count: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For `count` images, `size` pixels wide: places in OPERATIONS and levels, (rounds, count).

    A magnitude of its own for every image with "trivial", the same for all with "rand".
    """
    rounds, magnitude = wanted.rand_augment if wanted.auto_augment == "rand" else (1, None)
    operations = generator.integers(0, len(OPERATIONS), (rounds, count))
    signs = generator.integers(0, 2, (rounds, count))
    magnitudes = generator.integers(0, MAGNITUDES, (rounds, count))
    if magnitude is not None:
        magnitudes[:] = magnitude
    return operations, level_table(wanted.auto_augment, size)[operations, signs, magnitudes]


def auto_augment(
    pixels: Tensor, operations: NDArray[np.int64], levels: NDArray[np.float32]
) -> Tensor:
    """Round after round of operations as `draw_operations` gives them; whole numbers.

    pixels (B, 3, S, S) float32, on any device: rounded, and overwritten. No loop over the images,
    and the device is not waited for. Results are cut to whole numbers after each round as by
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
