"""Where random crops lie, for one image or a whole batch: the same in every back end."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.order import Draws

Box = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def crop_box(
    height: ArrayLike,
    width: ArrayLike,
    draws: Draws,
    index: int | slice,
    aspect_ratio: tuple[float, float],
) -> Box:
    """(top, left, height, width) of torchvision's RandomResizedCrop, in float32 as DALI computes.

    `height` and `width` are those of image `index` of the batch, or arrays for a slice of it. The
    first drawn crop that fits; if none does, the largest in the centre whose aspect ratio is
    allowed.
    """
    height, width = np.asarray(height, np.int64), np.asarray(width, np.int64)
    pixels = height.astype(np.float32) * width.astype(np.float32)
    area, ratio = pixels[..., None] * draws.area[index], draws.ratio[index]
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
        np.where(found, place(offset, room + 1), room // 2)
        for offset, room in zip(np.moveaxis(draws.offset[index], -1, 0), rooms, strict=True)
    )
    return top, left, high, wide


def place(offset: NDArray[np.float32], count: ArrayLike) -> NDArray[np.int64]:
    """Which of `count` places the drawn `offset` in [0, 1) names."""
    return np.floor(offset * np.asarray(count, np.float32)).astype(np.int64)
