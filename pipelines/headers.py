"""What an image file shows without being decoded: format, size, and whether its end is there.

Cheap enough to ask of every file before training. It is as strict as the strictest back end: DALI
refuses some files that Pillow reads (stray bytes in a JPEG's header, a PNG without its end), and
Pillow some that DALI reads.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from pipelines.containers import HEAD, jpeg_size, png_size, webp_size
from pipelines.damage import FORMATS, Damage, check_size
from pipelines.images import ImageFile
from pipelines.parts import Part
from pipelines.shard_format import BLOCK, is_member

MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"P2": "PPM",
    b"P3": "PPM",
    b"P4": "PPM",
    b"P5": "PPM",
    b"P6": "PPM",
    b"\x00\x00\x00\x0cjP  ": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
}
"""First bytes and Pillow's name of the format; WebP is told by two places."""
OTHERS = {
    b"GIF8": "GIF",
    b"8BPS": "PSD",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
}
"""First bytes of images that not every back end decodes."""
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIC"),
}
"""The same for those that bytes 4 to 12 tell: "ftyp", then one of these."""
WHOLE = frozenset({"JPEG", "PNG", "WEBP"})
"""Formats whose header and end are read here; files of the others are decoded to know of both."""


@dataclass(frozen=True, slots=True)
class Header:
    """What every back end agrees on."""

    format: str
    """Pillow's name: JPEG, PNG, WEBP, BMP, TIFF, PPM or JPEG2000."""
    width: int
    height: int


def open_file(path: str | bytes) -> tuple[int, os.stat_result]:
    """A descriptor to read from, to be closed, and its status; never waits, as on a FIFO.

    Raises Damage for what cannot be opened or is no regular file.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(error) from error
    status = os.fstat(file)
    if stat.S_ISREG(status.st_mode):
        return file, status
    os.close(file)
    raise Damage("not-a-file", "is no regular file")


def unreadable(error: OSError) -> Damage:
    return Damage("unreadable", f"cannot be read ({error.strerror})")


def read_header(part: Part) -> Header:
    """The header of an image; raises Damage for what cannot be one.

    JPEG, PNG and WebP must also have their end. Of the other formats only the size is known, by
    Pillow's reader: decode them to know more.
    """
    try:
        head = part.read(HEAD, 0)
        if not head:
            raise Damage("empty", "is empty")
        name = format_of(head)
        if name == "JPEG":
            width, height = jpeg_size(part, head)
        elif name == "PNG":
            width, height = png_size(part, head)
        elif name == "WEBP":
            width, height = webp_size(part, head)
        else:
            width, height = size_by_pillow(part, name)
    except OSError as error:
        raise unreadable(error) from error
    check_size(width, height)
    return Header(name, width, height)


def format_of(head: bytes) -> str:
    """Pillow's name of the format; raises Damage for others and for what is no image."""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    other = next((name for magic, name in OTHERS.items() if head.startswith(magic)), None)
    if head[4:8] == b"ftyp":
        other = BRANDS.get(head[8:12])
    if other is not None:
        raise Damage("format", f"is no image that every back end reads ({other}, not {FORMATS})")
    raise Damage("junk", f"is no image ({FORMATS})")


def size_by_pillow(part: Part, name: str) -> tuple[int, int]:
    """(width, height) of a rare format."""
    from pipelines.decoding import open_image

    with part.stream() as stream, open_image(stream, name) as image:
        return image.size


def check_file(image: ImageFile, pixels: bool = False) -> Header:
    """Raise Damage for an image that a back end will not read, as far as is seen at little cost.

    JPEG, PNG and WebP: the header and the end, and with `pixels` all of it. The other formats are
    decoded anyway. In a shard, the tar header is looked at, too.
    """
    file, status = open_file(image.path)
    try:
        if image.size is None:
            part = Part(file, 0, status.st_size)
        else:
            part = Part(file, image.start, image.size)
            check_member(part, image.name)
        header = read_header(part)
        if pixels or header.format not in WHOLE:
            from pipelines.decoding import check_pixels

            with part.stream() as stream:
                check_pixels(stream, header.format)
        return header
    finally:
        os.close(file)


def check_member(part: Part, name: str) -> None:
    """Raise Damage unless the shard has this member, a plain file, where its index says."""
    try:
        header = os.pread(part.file, BLOCK, part.start - BLOCK)
    except OSError as error:
        raise unreadable(error) from error
    if not is_member(header, name, part.size):
        raise Damage("corrupt", "is not what its shard has there (another tar header)")
