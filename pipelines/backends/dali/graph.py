"""Define the DALI graphs, in HWC: from files to decoded images, on a GPU to normalised ones.

On a CPU `pipelines.backends.dali.finish` does the rest. Both give the pixels of torchvision for the
same random numbers, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode

from pipelines.environment import nvjpeg_version
from pipelines.loader import LoaderSpec

Inputs = Mapping[str, DataNode]
"""What `Feed.nodes` defines."""
NEVER = 2**30
"""Bytes that no encoded image has."""
FANCY_WINDOWS = (13, 2)
"""Version of nvJPEG before which a window that is upsampled as on a CPU, which is called fancy, is
left to the CPU or wrong at its edges."""


def encoded_files(inputs: Inputs, packed: bool) -> DataNode:
    """Read the files; `packed`: they have been read."""
    files = inputs["files"]
    # Mapping a file of 110 KB takes three times as long as copying it out of the page cache.
    return files if packed else fn.io.file.read(files, dont_use_mmap=True)


def decoded_graph(spec: LoaderSpec, encoded: DataNode, inputs: Inputs) -> DataNode:
    """Decode the windows of random crops where the inputs have any, else whole images."""
    encoded = checked(encoded, inputs)
    if "start" in inputs:
        return decode_window(spec, encoded, inputs)
    return decode_whole(spec, encoded)


def finished_graph(spec: LoaderSpec, images: DataNode, inputs: Inputs) -> DataNode:
    """Turn decoded images upright where asked for, resize, crop, mirror and normalise them."""
    if "turns" in inputs:  # no operator swaps the axes of some images only; pixels are copied
        images = fn.warp_affine(
            images,
            matrix=inputs["turns"],
            size=inputs["turned"],
            interp_type=types.INTERP_NN,
        )
    crop = {name: inputs[name] for name in inputs if name.startswith("crop_")}
    images = resize(images, inputs["size"])
    return normalise(spec, images, mirror=inputs["mirror"], rounding="truncate", **crop)


def checked(encoded: DataNode, inputs: Inputs) -> DataNode:
    """Return the encoded images once their headers have been read and have the shapes expected.

    On a damaged header the decoder of DALI 2.4, in about half of all cases, crashes the process
    instead of raising; and so it does for a window that is not within the image. The operators here
    raise, and the decoder waits for them, since the number of its bytes, which stay where they are,
    depends on them: -1, all there are, or NEVER.
    """
    shape = fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=False)
    differs = (shape[0:1] != inputs["height"]) | (shape[1:2] != inputs["width"])
    return fn.reinterpret(encoded, shape=differs * (NEVER + 1) - 1)


def decode_whole(spec: LoaderSpec, encoded: DataNode) -> DataNode:
    """Decode images to RGB in HWC; EXIF orientation is not applied."""
    return fn.decoders.image(encoded, **decoder_options(spec, windows=False))


def decode_window(spec: LoaderSpec, encoded: DataNode, inputs: Inputs) -> DataNode:
    """Decode a window of each image to RGB in HWC; EXIF orientation is not applied."""
    window = {"start": inputs["start"], "shape": inputs["extent"], "axes": [0, 1]}
    if spec.device != "cpu" and spec.dali.whole_images:
        return fn.slice(decode_whole(spec, encoded), **window)
    return fn.decoders.image_slice(encoded, **window, **decoder_options(spec, windows=True))


def decoder_options(spec: LoaderSpec, windows: bool) -> dict[str, Any]:
    """Make arguments for a decoder on the CPU or a GPU; EXIF orientation is not applied."""
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if spec.device == "cpu":
        return options | {"device": "cpu"}
    settings = spec.dali
    options |= {"device": "mixed", "hw_decoder_load": settings.hw_decoder_load}
    if not windows or nvjpeg_version() >= FANCY_WINDOWS:
        options["jpeg_fancy_upsampling"] = True  # the pixels of the CPU's decoder
    if settings.width_hint and settings.height_hint:
        options["preallocate_width_hint"] = settings.width_hint
        options["preallocate_height_hint"] = settings.height_hint
    return options


def resize(images: DataNode, size: DataNode) -> DataNode:
    """Resize as Pillow's BILINEAR does: triangular filter, widened when the image shrinks."""
    return fn.resize(
        images,
        size=size,
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
