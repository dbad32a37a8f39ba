"""The DALI graphs: from encoded files to normalised images, in HWC, on the CPU or a GPU.

Each gives the pixels that torchvision gives for the same random numbers, up to rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode

from pipelines.loader import LoaderSpec
from pipelines.order import ATTEMPTS

HW_DECODER_LOAD = 0.99
LARGEST_IMAGE = (6430, 5980)
"""Height and width in ImageNet: the hardware decoder's buffers are made once, for these."""


def random_crop_graph(
    spec: LoaderSpec,
    encoded: DataNode,
    size: DataNode,
    offset: DataNode,
    mirror: DataNode,
    area: DataNode,
    ratio: DataNode,
) -> DataNode:
    """torchvision's RandomResizedCrop: the first of the drawn crops that fits, else the centre."""
    full = fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)
    height, width = full[0], full[1]
    pixels = height * width * area
    heights = dali_math.floor(dali_math.sqrt(pixels / ratio) + 0.5)
    widths = dali_math.floor(dali_math.sqrt(pixels * ratio) + 0.5)
    fits = (heights <= height) * (widths <= width) * (heights > 0) * (widths > 0)
    rank = fits * types.Constant(np.arange(ATTEMPTS, 0, -1, dtype=np.float32))
    best = fn.reductions.max(rank)
    found = best > 0
    chosen = rank == best
    lowest, highest = spec.aspect_ratio
    high = fn.reductions.max(chosen * heights) * found + (1 - found) * dali_math.min(
        height, dali_math.floor(width / lowest + 0.5)
    )
    wide = fn.reductions.max(chosen * widths) * found + (1 - found) * dali_math.min(
        width, dali_math.floor(height * highest + 0.5)
    )
    place = offset * found + 0.5 * (1 - found)
    top = dali_math.floor(place[0] * (height - high + found))
    left = dali_math.floor(place[1] * (width - wide + found))
    images = fn.decoders.image_slice(
        encoded,
        start=fn.cast(fn.stack(top, left), dtype=types.INT32),
        shape=fn.cast(fn.stack(high, wide), dtype=types.INT32),
        axes=[0, 1],
        **decoder_options(spec),
    )
    return normalise(spec, resize(images, size, size), mirror=mirror)


def reflect_pad_graph(
    spec: LoaderSpec, encoded: DataNode, size: DataNode, offset: DataNode, mirror: DataNode
) -> DataNode:
    """The whole image, padded as torch's "reflect" does, cropped back to its size at random."""
    pad = spec.reflect_pad
    images = resize(fn.decoders.image(encoded, **decoder_options(spec)), size, size)
    top, bottom = images[1 : pad + 1], images[-pad - 1 : -1]
    top, bottom = (fn.flip(part, vertical=1, horizontal=0) for part in (top, bottom))
    images = fn.cat(top, images, bottom, axis=0)
    left, right = images[:, 1 : pad + 1], images[:, -pad - 1 : -1]
    images = fn.cat(fn.flip(left), images, fn.flip(right), axis=1)
    start = dali_math.floor(offset * (2 * pad + 1))
    place = crop(size, (start[0], start[1]), (2 * pad, 2 * pad))
    return normalise(spec, images, mirror=mirror, **place)


def validation_graph(spec: LoaderSpec, encoded: DataNode, size: DataNode) -> DataNode:
    """torchvision's Resize and CenterCrop, to the pixel: the long side is rounded down."""
    full = fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)
    height, width = full[0], full[1]
    short = dali_math.floor(size * spec.resize_ratio + 0.5)
    shorter = dali_math.min(height, width)
    high = dali_math.floor(short * height / shorter)
    wide = dali_math.floor(short * width / shorter)
    images = fn.decoders.image(encoded, **decoder_options(spec))
    rooms = (high - size, wide - size)
    place = crop(size, (centre(rooms[0]), centre(rooms[1])), rooms)
    return normalise(spec, resize(images, high, wide), **place)


def centre(room: DataNode) -> DataNode:
    """Where a centre crop begins that leaves `room` pixels; halves go to the even side."""
    half = dali_math.floor(room / 2)
    room_is_odd = room - 2 * half
    half_is_odd = half - 2 * dali_math.floor(half / 2)
    return half + room_is_odd * half_is_odd


def crop(size: DataNode, start: tuple[Any, Any], room: tuple[Any, Any]) -> dict[str, Any]:
    """Arguments for a crop of size x size that begins `start` pixels into `room` (y, x).

    DALI takes the place as a fraction of the room and truncates: the quarters of a pixel keep
    rounding errors from moving it, and 0 / 0 away.
    """
    top, left = (
        (begin + 0.25) / (pixels + 0.25) for begin, pixels in zip(start, room, strict=True)
    )
    return {
        "crop_h": size,
        "crop_w": size,
        "crop_pos_y": top,
        "crop_pos_x": left,
        "rounding": "truncate",
    }


def resize(images: DataNode, high: DataNode, wide: DataNode) -> DataNode:
    """Resize as Pillow's BILINEAR does: triangular filter, widened when the image shrinks."""
    return fn.resize(
        images,
        size=fn.stack(high, wide),
        interp_type=types.INTERP_TRIANGULAR,
        antialias=True,
        subpixel_scale=False,
    )


def normalise(spec: LoaderSpec, images: DataNode, **options: Any) -> DataNode:
    """Crop and mirror as asked, then (pixel / 255 - mean) / std; HWC."""
    return fn.crop_mirror_normalize(
        images,
        mean=[255 * value for value in spec.mean],
        std=[255 * value for value in spec.std],
        dtype=types.FLOAT16 if spec.half else types.FLOAT,
        output_layout="HWC",
        **options,
    )


def decoder_options(spec: LoaderSpec) -> dict[str, Any]:
    """Arguments for a decoder, as on the CPU so on the GPU; EXIF orientation is not applied."""
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if spec.device == "cpu":
        return options | {"device": "cpu"}
    height, width = LARGEST_IMAGE
    return options | {
        "device": "mixed",
        "hw_decoder_load": HW_DECODER_LOAD,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
        "jpeg_fancy_upsampling": True,
    }
