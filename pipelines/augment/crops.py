"""Crop, resize and normalise whole batches as tensors, without a loop over the images."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

PIECE = 2**21
"""Values that `resized_crop` processes at a time on a CPU: as floats, 8 MiB of cache."""


def reflect_crop(images: Tensor, offset: Tensor, mirror: Tensor, pad: int) -> Tensor:
    """Pad by reflection, crop back to the old size, mirror: each image in its own way.

    images (B, C, S, S), channels_last; `offset` (B, 2) float in [0, 1), vertical then horizontal,
    scales to one of 2 pad + 1 positions; `mirror` (B,) is not 0 where the crop is flipped
    left-right.
    Padding is that of torch.nn.functional.pad's "reflect": the border pixel is not repeated.
    -> (B, C, S, S) channels_last, on the same device.
    """
    size = images.shape[-1]
    border = reflected(torch.arange(-pad, size + pad, device=images.device), size)
    padded = images.permute(0, 2, 3, 1).index_select(1, border).index_select(2, border)
    top, left = (offset * (2 * pad + 1)).floor().long().unbind(1)
    index = torch.arange(len(images), device=images.device)
    return window_crop(padded, index, top, left, mirror, size).permute(0, 3, 1, 2)


def reflected(index: Tensor, size: int) -> Tensor:
    """Fold indices beyond 0..size-1 back about the border pixels."""
    return size - 1 - (size - 1 - index.abs()).abs()


def window_crop(
    images: Tensor, index: Tensor, top: Tensor, left: Tensor, mirror: Tensor, size: int
) -> Tensor:
    """Cut a window from each of the chosen images, mirrored where asked.

    images (N, H, W, C); `index`, `top` and `left` (B,) int64: the image, and the corner of its
    window; `mirror` (B,) is not 0 where the window is flipped left-right.
    -> (B, size, size, C), contiguous, on the same device.
    """
    windows = images.unfold(1, size, 1).unfold(2, size, 1).permute(0, 1, 2, 4, 5, 3)
    take = take_rows if images.device.type == "cpu" else take_pixels
    return take(windows, index, top, left, mirror)


def take_pixels(
    windows: Tensor, index: Tensor, top: Tensor, left: Tensor, mirror: Tensor
) -> Tensor:
    """Do `window_crop` from a view of all windows, on any device."""
    pixels = windows[index, top, left]
    return torch.where(mirror[:, None, None, None] != 0, pixels.flip(2), pixels).contiguous()


def take_rows(windows: Tensor, index: Tensor, top: Tensor, left: Tensor, mirror: Tensor) -> Tensor:
    """Do the same much faster on a CPU: NumPy copies rows where torch copies single bytes."""
    pixels = windows.numpy()[index.numpy(), top.numpy(), left.numpy()]
    mirrored = mirror.numpy().nonzero()[0]
    pixels[mirrored] = torch.from_numpy(pixels[mirrored]).flip(2).numpy()
    return torch.from_numpy(pixels)


def resized_crop(
    images: Tensor, index: Tensor, box: tuple[Tensor, ...], mirror: Tensor, size: int
) -> Tensor:
    """Crop and resize each of the chosen images as torchvision does with antialias=True.

    images (N, H, W, C) uint8; `index` (B,) int64; `box` (top, left, height, width), each (B,)
    float32, in fractional pixels; `mirror` (B,) is not 0 where the crop is flipped
    left-right. -> (B, size, size, C) float32 in 0..255, not rounded, on the same device.
    """
    count = len(index)
    if images.device.type == "cpu":
        # Pieces that fit the cache take half the time for large images.
        count = max(1, PIECE // images[:1].numel())
    pieces = zip(*(part.split(count) for part in (index, *box, mirror)), strict=True)
    return torch.cat([resize_piece(images, part, size) for part in pieces])


def resize_piece(images: Tensor, piece: tuple[Tensor, ...], size: int) -> Tensor:
    """Do `resized_crop` for a few images: interpolate first rows, then columns."""
    index, top, left, high, wide, mirror = piece
    pixels = images.index_select(0, index).float()
    pixels = resize_rows(pixels, top, high, size).transpose(1, 2).contiguous()
    return resize_rows(pixels, left, wide, size, mirror).transpose(1, 2)


def resize_rows(
    images: Tensor, start: Tensor, length: Tensor, size: int, reverse: Tensor | None = None
) -> Tensor:
    """Interpolate the rows between `start` and start + length of each image to `size` rows.

    images (B, H, W, C) float32, the others (B,). The filter is a triangle that is widened when
    shrinking, cut off at the ends and normalised to a sum of 1: that of Pillow and of
    torch.nn.functional.interpolate(mode="bilinear", antialias=True). -> (B, size, W, C).
    """
    count, height, width, channels = images.shape
    device = images.device
    scale = (length / size)[:, None]
    steps = torch.arange(size, device=device) + 0.5
    if reverse is not None:
        steps = torch.where(reverse[:, None] != 0, size - steps, steps)
    start = start[:, None]
    centre = start + scale * steps
    reach = scale.clamp(min=1)
    taps = torch.arange(ceil(2 * max(1, height / size)), device=device)
    row = (centre - reach + 0.5).floor()[..., None] + taps
    near = 1 - ((row + 0.5 - centre[..., None]) / reach[..., None]).abs()
    start, end = start[..., None], (start + length[:, None])[..., None]
    covered = torch.minimum(row + 1, end) - torch.maximum(row, start)
    weights = near.clamp(min=0) * covered.clamp(0, 1)
    weights /= weights.sum(2, keepdim=True)
    first = height * torch.arange(count, device=device)[:, None, None]
    rows = (row.clamp(0, height - 1).long() + first).flatten(0, 1)
    mixed = embedding_bag(
        rows,
        images.view(count * height, width * channels),
        mode="sum",
        per_sample_weights=weights.flatten(0, 1),
    )
    return mixed.view(count, size, width, channels)


def on_device(device: torch.device, *rows: NDArray[Any]) -> tuple[Tensor, ...]:
    """Copy arrays of one dtype and length to the device in one asynchronous transfer."""
    table = torch.from_numpy(np.stack(rows))
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return table.unbind()


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Compute (pixel - mean) / std by channel.

    pixels (B, H, W, 3), uint8, or float32 that is overwritten; mean and std (3,) float32, in the
    units of the pixels. -> (B, 3, H, W) float32, channels_last.
    """
    width = pixels.shape[2]
    # Whole rows, since torch is slow on a CPU where the last dimension is short.
    rows = pixels.flatten(2).float().sub_(mean.repeat(width)).div_(std.repeat(width))
    return rows.view(pixels.shape).permute(0, 3, 1, 2)
