"""Turn an opened image into RGB: the one place where that is done, as DALI does it, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
"""EXIF tag."""
EXIF = frozenset({"exif", "xmp", "XML:com.adobe.xmp"})
"""Where Pillow looks for it."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each EXIF orientation but 1 upright."""
BACK = {6: 8, 8: 6}
"""The orientation that undoes another one; all others undo themselves."""
SIDEWAYS = frozenset({5, 6, 7, 8})
"""Orientations that swap height and width."""


def rgb(image: Image.Image) -> Image.Image:
    """Decode to RGB of 8 bits, as it is stored: EXIF orientation is not applied.

    16 bits of grey are scaled, 65,535 to 255, where Pillow would cut them off at 255. Transparency
    is dropped. Raises what Pillow raises for an image that cannot be decoded.
    """
    turned = orientation_of(image) if image.format == "TIFF" else 1
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        pixels = Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    else:
        pixels = image.convert("RGB")
    if turned in UPRIGHT:  # Pillow turns a TIFF upright as it loads it, and no other image
        pixels = pixels.transpose(UPRIGHT[BACK.get(turned, turned)])
    return pixels


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height as they are stored, of an image that is opened and not yet loaded."""
    width, height = image.size
    swapped = image.format == "TIFF" and orientation_of(image) in SIDEWAYS
    return (height, width) if swapped else (width, height)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none that makes sense."""
    if image.format != "TIFF" and EXIF.isdisjoint(image.info):
        return 1  # of a PNG, Pillow would decode the pixels to look behind them
    found = metadata(lambda: image.getexif().get(ORIENTATION, 1), 1)
    return found if found in UPRIGHT else 1


def metadata(read: Callable[[], Any], default: int) -> int:
    """Read a number of an image's metadata. Pillow raises many things where it is damaged.

    That keeps no back end from reading the image.
    """
    try:
        return int(read())
    except Exception:
        return default
