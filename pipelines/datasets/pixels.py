"""Turn an opened image into RGB: the one place where that is done, as DALI does it, too.

EXIF orientation is read here, too, for all back ends: Pillow would take it from XMP as well, and
DALI has rules of its own. Where a recipe is `upright`, decoded pixels are turned by it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

ORIENTATION = 0x0112
"""Tag of EXIF and TIFF."""
EXIF = b"Exif\0\0"
"""What EXIF begins with in a JPEG."""
MAX_EXIF = 1 << 16
"""Bytes that are looked at; the orientation is among the first."""
ORIENTATIONS = np.arange(9)
ROWS_REVERSED = np.isin(ORIENTATIONS, (3, 4, 6, 7))
COLUMNS_REVERSED = np.isin(ORIENTATIONS, (2, 3, 7, 8))
SIDEWAYS = np.isin(ORIENTATIONS, (5, 6, 7, 8))
"""By EXIF orientation, what turns an image upright: its rows are reversed, its columns are, then
height and width are swapped."""
BACK = {6: 8, 8: 6}
"""The orientation that undoes another one; all others undo themselves."""


def rgb(image: Image.Image, upright: bool = False) -> Image.Image:
    """Decode to RGB of 8 bits, as it is stored, or turned `upright` by its EXIF orientation.

    16 bits of grey are scaled, 65,535 to 255, where Pillow would cut them off at 255. Transparency
    is dropped. Raises what Pillow raises for an image that cannot be decoded.
    """
    turned = 1
    if image.format == "TIFF":  # Pillow turns it as it loads it, and no other image
        turned = valid(metadata(lambda: image.getexif().get(ORIENTATION, 1), 1))
    orientation = orientation_of(image) if upright else 1
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        pixels = Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    else:
        pixels = image.convert("RGB")
    for each in (BACK.get(turned, turned), orientation):
        if each != 1:
            pixels = Image.fromarray(turned_upright(np.asarray(pixels), each))
    return pixels


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height as they are stored, of an image that is opened and not yet loaded."""
    width, height = image.size
    swapped = image.format == "TIFF" and SIDEWAYS[orientation_of(image)]
    return (height, width) if swapped else (width, height)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none that makes sense.

    XMP does not count. A PNG is decoded where its EXIF may stand behind the pixels; a TIFF must not
    have been loaded, which turns it. Raises what Pillow raises.
    """
    if isinstance(image, TiffImageFile):
        return valid(metadata(lambda: image.tag_v2.get(ORIENTATION, 1), 1))
    if image.format == "PNG" and "exif" not in image.info:
        image.load()
    return exif_orientation(image.info.get("exif", b""))


def exif_orientation(exif: bytes) -> int:
    """Read the orientation, 1 to 8, of EXIF as files have it; 1 where it is missing or damaged."""
    exif = exif.removeprefix(EXIF)[:MAX_EXIF]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", exif, entry)
            if tag == ORIENTATION:
                value = {3: "H", 4: "I"}.get(kind) if values == 1 else None
                return valid(struct.unpack_from(order + value, exif, entry + 8)[0]) if value else 1
    except struct.error:
        pass  # it ends too early
    return 1


def valid(orientation: int) -> int:
    """Return an orientation, or 1 in the place of a number that is none."""
    return orientation if 1 <= orientation <= 8 else 1


def turned_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Copy stored pixels (H, W, 3), contiguous, as they are upright."""
    whole = pixels.view("V3")[..., 0]  # which is copied twice as fast as three bytes
    whole = whole[:: -1 if ROWS_REVERSED[orientation] else 1]
    whole = whole[:, :: -1 if COLUMNS_REVERSED[orientation] else 1]
    whole = np.ascontiguousarray(whole.T if SIDEWAYS[orientation] else whole)
    return whole[..., None].view(np.uint8)


Pairs = NDArray[np.int64]
"""(N, 2): vertical, horizontal."""


def swapped(pairs: Pairs, orientations: NDArray[np.int8]) -> Pairs:
    """Swap the pairs of images whose height and width are: shapes as they are upright, or back."""
    return np.where(SIDEWAYS[orientations][:, None], pairs[:, ::-1], pairs)


def stored_windows(
    start: Pairs, extent: Pairs, shapes: Pairs, orientations: NDArray[np.int8]
) -> tuple[Pairs, Pairs]:
    """Find windows of upright images, given by where they begin and their sizes, in the stored
    ones, which have these `shapes`."""
    start, extent = swapped(start, orientations), swapped(extent, orientations)
    is_reversed = np.stack([ROWS_REVERSED[orientations], COLUMNS_REVERSED[orientations]], 1)
    return np.where(is_reversed, shapes - start - extent, start), extent


def metadata(read: Callable[[], Any], default: int) -> int:
    """Read a number of an image's metadata. Pillow raises many things where it is damaged.

    That keeps no back end from reading the image.
    """
    try:
        return int(read())
    except Exception:
        return default
