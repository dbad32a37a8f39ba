"""Define the DALI graphs, in HWC: from files to decoded images, on a GPU to normalised ones.

On a CPU `pipelines.backends.dali.finish` does the rest. Both give the pixels of torchvision for the
same random numbers, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode

from pipelines.loader import LoaderSpec
from pipelines.sampling import ATTEMPTS

Pair = tuple[DataNode, DataNode]
"""Vertical, horizontal."""


def decoded_graph(spec: LoaderSpec, encoded: DataNode, crops: Sequence[DataNode]) -> DataNode:
    """Decode the windows of random crops, where `crops` are offset, area and ratio of `CropParams`,
    or whole images, where it is empty."""
    if not crops:
        return decode_whole(spec, encoded)
    return decode_window(spec, encoded, *random_window(spec, encoded, *crops))


def finished_graph(
    spec: LoaderSpec, encoded: DataNode, images: DataNode, shape: DataNode, *mirror: DataNode
) -> DataNode:
    """Resize decoded images to `shape`, crop, mirror and normalise them."""
    high, wide = shape[0], shape[1]
    if not spec.training:
        return validation_view(spec, encoded, images, (high, wide))
    options = {"mirror": mirror[0]} if mirror else {}
    return normalise(spec, resize(images, high, wide), **options)


def random_window(
    spec: LoaderSpec, encoded: DataNode, offset: DataNode, area: DataNode, ratio: DataNode
) -> tuple[Pair, Pair]:
    """Compute start and shape of RandomResizedCrop's window as `crop_box` does."""
    height, width = shape_of(encoded)
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
    offset = offset * found + 0.5 * (1 - found)
    top = dali_math.floor(offset[0] * (height - high + found))
    left = dali_math.floor(offset[1] * (width - wide + found))
    return (top, left), (high, wide)


def validation_view(spec: LoaderSpec, encoded: DataNode, images: DataNode, shape: Pair) -> DataNode:
    """Apply torchvision's Resize and CenterCrop to `shape`: long sides are rounded down."""
    height, width = shape_of(encoded)
    short = dali_math.floor(dali_math.min(*shape) * spec.resize_ratio + 0.5)
    shorter = dali_math.min(height, width)
    high = dali_math.floor(short * height / shorter)
    wide = dali_math.floor(short * width / shorter)
    rooms = (high - shape[0], wide - shape[1])
    window = crop(shape, (centre(rooms[0]), centre(rooms[1])), rooms)
    return normalise(spec, resize(images, high, wide), **window)


def shape_of(encoded: DataNode) -> tuple[DataNode, DataNode]:
    """Read height and width from the header, as floats; a damaged header raises."""
    shape = fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)
    return shape[0], shape[1]


def decode_whole(spec: LoaderSpec, encoded: DataNode) -> DataNode:
    """Decode an image to RGB in HWC; EXIF orientation is not applied.

    Adding 0 times its height makes the decoder wait until the header has been read: on a damaged
    one the decoder of DALI 2.4, in about half of all cases, crashes the process instead of raising.
    """
    height, _ = shape_of(encoded)
    guarded = encoded + fn.cast(0 * height, dtype=types.UINT8)
    options = decoder_options(spec)
    if spec.device != "cpu":
        options["jpeg_fancy_upsampling"] = True  # the pixels of the CPU's decoder
    return fn.decoders.image(guarded, **options)


def decode_window(spec: LoaderSpec, encoded: DataNode, start: Pair, shape: Pair) -> DataNode:
    """Decode a window (y, x) of an image to RGB in HWC; its corners follow from `shape_of`.

    Without fancy upsampling: before version 13.2, nvJPEG leaves windows of 4:2:0 images that ask
    for it to the CPU.
    """
    return fn.decoders.image_slice(
        encoded,
        start=fn.cast(fn.stack(*start), dtype=types.INT32),
        shape=fn.cast(fn.stack(*shape), dtype=types.INT32),
        axes=[0, 1],
        **decoder_options(spec),
    )


def decoder_options(spec: LoaderSpec) -> dict[str, Any]:
    """Make arguments for a decoder on the CPU or a GPU; EXIF orientation is not applied."""
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if spec.device == "cpu":
        return options | {"device": "cpu"}
    settings = spec.dali
    options |= {"device": "mixed", "hw_decoder_load": settings.hw_decoder_load}
    if settings.width_hint and settings.height_hint:
        options["preallocate_width_hint"] = settings.width_hint
        options["preallocate_height_hint"] = settings.height_hint
    return options


def centre(room: DataNode) -> DataNode:
    """Compute where a centre crop begins that leaves `room` pixels; halves are rounded to even."""
    half = dali_math.floor(room / 2)
    room_is_odd = room - 2 * half
    half_is_odd = half - 2 * dali_math.floor(half / 2)
    return half + room_is_odd * half_is_odd


def crop(shape: Pair, start: tuple[Any, Any], room: tuple[Any, Any]) -> dict[str, Any]:
    """Make arguments for a crop of `shape` that begins `start` pixels into `room` (y, x).

    DALI takes the start as a fraction of the room and truncates: the quarters of a pixel keep
    rounding errors from moving it, and avoid 0 / 0.
    """
    top, left = (
        (begin + 0.25) / (pixels + 0.25) for begin, pixels in zip(start, room, strict=True)
    )
    return {
        "crop_h": shape[0],
        "crop_w": shape[1],
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
