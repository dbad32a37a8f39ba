"""Pillow as the judge of files whose pixels have to be read to know whether they are whole."""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from pipelines.damage import MAX_PIXELS, Damage, check_size

BLOCK = 1 << 20
"""Bytes that are read at a time."""
PNG_CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})


def open_image(stream: BinaryIO, name: str) -> Image.Image:
    """The image of a known format, from its start, not decoded yet; to be closed.

    Raises Damage where Pillow cannot read the header, or DALI is known not to.
    """
    stream.seek(0)
    try:
        image = Image.open(stream, formats=(name,))
    except Exception as error:
        raise damage(error) from error
    check_size(*image.size)
    check_dali(image)
    return image


def check_dali(image: Image.Image) -> None:
    """Raise Damage for what Pillow reads of TIFF and JPEG 2000 and DALI 2.4 does not."""
    compression = image.info.get("compression")
    if isinstance(image, TiffImageFile):
        bits = image.mode == "1" and compression == "raw"
        if bits or image.mode == "I" or compression in ("lzma", "webp"):
            what = f"{compression}, mode {image.mode}"
            raise Damage("format", f"is a TIFF that not every back end reads ({what})")
        try:
            _ = image.n_frames  # Pillow reads the headers of all pages, as DALI does at once
        except Exception as error:
            raise Damage("corrupt", "cannot be decoded (its list of pages)") from error
    elif image.format == "JPEG2000" and image.mode == "LA":
        raise Damage("format", "is a JPEG 2000 that not every back end reads (two channels)")


def check_pixels(stream: BinaryIO, name: str) -> None:
    """Raise Damage for an image of a known format that Pillow or DALI cannot decode."""
    if name == "PNG":
        check_png_chunks(stream)
    with open_image(stream, name) as image:
        read_pixels(image)


def read_pixels(image: Image.Image) -> None:
    """Decode the image; raises Damage if that cannot be done."""
    try:
        image.load()
    except Exception as error:
        raise damage(error) from error


def check_png_chunks(stream: BinaryIO) -> None:
    """Raise Damage for what libpng, and so DALI, refuses and Pillow overlooks.

    The checksums of the critical chunks, and critical chunks that are not known.
    """
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        left, name = struct.unpack(">I4s", head)
        critical = not name[0] & 0x20
        if critical and name not in PNG_CRITICAL:
            raise Damage("corrupt", f"cannot be decoded (an unknown PNG chunk, {name!r})")
        checksum = zlib.crc32(name)
        while left and (data := stream.read(min(left, BLOCK))):
            checksum = zlib.crc32(data, checksum)
            left -= len(data)
        found = stream.read(4)
        if name == b"IEND":
            return
        if critical and found != checksum.to_bytes(4, "big"):
            raise Damage("corrupt", f"cannot be decoded (wrong checksum of {name.decode()})")
    raise Damage("truncated", "is truncated (a PNG without its end)")


def damage(error: Exception) -> Damage:
    """What an exception of Pillow says about the file."""
    text = " ".join(str(error).split())
    if isinstance(error, Damage):
        return error
    if isinstance(error, MemoryError):
        return Damage("too-large", "cannot be decoded in the memory allowed for an image")
    if isinstance(error, Image.DecompressionBombError):
        return Damage("too-large", f"has more than {MAX_PIXELS:,} pixels")
    if isinstance(error, Image.UnidentifiedImageError):
        return Damage("corrupt", "cannot be decoded (its header is damaged)")
    if isinstance(error, OSError) and error.errno is not None:
        return Damage("unreadable", f"cannot be read ({error.strerror})")
    if "truncated" in text.lower():
        return Damage("truncated", f"is truncated ({text})")
    return Damage("corrupt", f"cannot be decoded ({text or type(error).__name__})")
