"""Augmentation of whole batches as tensors, without a loop over the images."""

from __future__ import annotations

import torch
from torch import Tensor


def reflect_crop(images: Tensor, offset: Tensor, mirror: Tensor, pad: int) -> Tensor:
    """Pad by reflection, crop back to the old size, mirror: each image in its own way.

    images (B, C, S, S), channels_last; `offset` (B, 2) float in [0, 1), vertical then horizontal,
    names one of the 2 pad + 1 places; `mirror` (B,) is not 0 where the crop is flipped left-right.
    Padding is that of torch.nn.functional.pad's "reflect": the border pixel is not repeated.
    -> (B, C, S, S) channels_last, on the same device.
    """
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    shift = (offset * (2 * pad + 1)).floor().long() - pad
    rows = reflected(place + shift[:, :1], size)
    columns = torch.where(mirror[:, None] != 0, size - 1 - place, place)
    columns = reflected(columns + shift[:, 1:], size)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    pixels = images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


def reflected(index: Tensor, size: int) -> Tensor:
    """Indices beyond 0..size-1 folded back about the border pixels."""
    return size - 1 - (size - 1 - index.abs()).abs()
