"""Check image files before training: headers, ends and, where asked for, every pixel.

The headers of JPEGs are walked here, 8 times as fast as Pillow opens them; all else is Pillow's.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from pipelines.datasets.images import ImageFile, Part, open_file, unreadable
from pipelines.datasets.pixels import (
    EXIF,
    MAX_EXIF,
    exif_orientation,
    orientation_of,
    stored_size,
)
from pipelines.datasets.shards import BLOCK, is_member
from pipelines.errors import Damage

FORMATS = "JPEG, PNG, BMP, TIFF, WebP, PNM or JPEG 2000"
"""What both DALI and Pillow decode."""
MAX_PIXELS = 178_956_970
"""Width times height: Pillow refuses more, twice its MAX_IMAGE_PIXELS, as decompression bombs."""
MAX_RATIO = 2000
"""Long side / short side. Validation enlarges the short side: at 288 px, an image of 20,000 x 10
takes 1.4 GB in either back end, and one of 65,000 x 1 would take 21."""


def check_size(width: int, height: int) -> None:
    """Raise Damage for an image without pixels, or with too many once it is decoded or enlarged."""
    if width < 1 or height < 1:
        raise Damage("corrupt", f"cannot be decoded (its header says {width} x {height} pixels)")
    if width * height > MAX_PIXELS:
        raise Damage("too-large", f"has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise Damage("too-thin", f"has {width} x {height} pixels, thinner than 1 : {MAX_RATIO}")


HEAD = 4096
"""Bytes that are read at a time."""
MAX_SEGMENTS = 10_000
"""Segments or chunks that a header may have."""
MAX_JPEG_SIDE = 65_500
"""Pixels; libjpeg refuses more."""
SEGMENT = struct.Struct(">BBH").unpack_from
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""SOF markers: what is left out are tables."""
BARE = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
"""Markers that cannot stand between the segments of a header."""
SCAN = 0xDA
APP1 = 0xE1
"""What EXIF is in, among others; where it is long, in several."""
ADOBE = 0xEE
"""APP14: says whether the inks of CMYK are inverted."""
MIN_WEBP = 21
"""Bytes of a WebP at least: up to the flags of its first chunk."""
WEBP_EXIF = 8
"""The bit of a WebP's flags that says that it has EXIF."""
NOT_ALL_READ = "is a {} that not every back end reads alike"
UNEQUAL_TIFFS = frozenset({"I", "F", "LA", "PA", "YCbCr", "LAB"})
"""Modes of TIFFs of which DALI makes other pixels than Pillow, or none."""
BITS, PHOTOMETRIC, EXTRA_SAMPLES = 258, 262, 338
"""Tags of a TIFF."""
WHITE_IS_ZERO, ASSOCIATED = 0, 1
"""Values of two of them: negatives, of which 16 bits are not inverted; and colours that have been
multiplied by their opacity."""
LUMA = b"\0\0\0\x12"
"""Number 18 of the enumerated colour spaces."""


def read_jpeg(part: Part, head: bytes) -> tuple[int, int, int]:
    """Walk the segments up to the first scan and find the end marker.

    Returns width, height and EXIF orientation.
    """
    at, base = 2, 0  # offset of the segment in the file, and where `head` begins
    width = height = -1
    channels, has_adobe, exif = 0, False, b""
    for _ in range(MAX_SEGMENTS):
        if at - base + 10 > len(head):
            head, base = part.read(HEAD, at), at
            if len(head) < 9:
                raise Damage("truncated", "is truncated in its header")
        first, marker, length = SEGMENT(head, at - base)
        if first == marker == 0xFF:  # fill
            at += 1
            continue
        if first != 0xFF or marker in BARE or length < 2:
            raise Damage("corrupt", f"cannot be decoded (no JPEG segment at byte {at})")
        if marker in FRAMES:
            precision = head[at - base + 4]
            height, width = struct.unpack_from(">HH", head, at - base + 5)
            channels = head[at - base + 9] if at - base + 9 < len(head) else 0
            if precision != 8:
                raise Damage("format", f"is a JPEG of {precision} bits a sample, which must be 8")
            if max(width, height) > MAX_JPEG_SIDE and width * height <= MAX_PIXELS:
                raise Damage("too-large", f"has a side of more than {MAX_JPEG_SIDE:,} pixels")
        elif marker == ADOBE:
            has_adobe = has_adobe or head[at - base + 4 : at - base + 9] == b"Adobe"
        elif marker == APP1 and head[at - base + 4 : at - base + 10] == EXIF:
            if len(exif) < MAX_EXIF:
                exif += part.read(length - 8, at + 10)
        at += 2 + length
        if marker == SCAN:
            if width < 0:
                raise Damage("corrupt", "cannot be decoded (a scan before the frame's header)")
            if channels == 4 and not has_adobe:
                what = "its inks may be inverted: back ends read negatives of each other"
                raise Damage("format", f"is a CMYK JPEG without Adobe's marker, {what}")
            check_jpeg_end(part, head if base == 0 else b"", at)
            return width, height, exif_orientation(exif)
    raise Damage("corrupt", f"cannot be decoded (more than {MAX_SEGMENTS:,} segments)")


def check_jpeg_end(part: Part, head: bytes, at: int) -> None:
    """Raise Damage unless there is an end marker behind `at`, where the first scan begins.

    It cannot occur in a scan's data, but cameras append to it: then all that follows is searched.
    """
    tail = head[-2:] if len(head) == part.size else part.read(2, part.size - 2)
    if tail == b"\xff\xd9" and at <= part.size - 2:
        return
    last = b""
    while at < part.size:
        data = part.read(1 << 20, at)
        if not data:
            break
        if b"\xff\xd9" in last + data:
            return
        at, last = at + len(data), data[-1:]
    raise Damage("truncated", "is truncated (a JPEG without its end)")


MAGIC = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\x00", b"MM\x00*", b"II+\x00"),
    "PPM": (b"P2", b"P3", b"P4", b"P5", b"P6"),
    "JPEG2000": (b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51"),
}
"""Pillow's name of a format: its first bytes; WebP has its own at two offsets."""
OTHERS = {
    "GIF": (b"GIF8",),
    "PSD": (b"8BPS",),
    "JPEG XL": (b"\xff\x0a", b"\x00\x00\x00\x0cJXL "),
}
"""The same of images that not every back end decodes."""
BRANDS = {
    "AVIF": (b"avif", b"avis"),
    "HEIC": (b"heic", b"heix", b"hevc", b"mif1", b"msf1"),
}
"""The same for those that bytes 4 to 12 tell: "ftyp", then one of these."""
WHOLE = frozenset({"JPEG", "PNG", "WEBP"})
"""Formats whose end is found without decoding; files of the others are decoded to find it."""


@dataclass(frozen=True, slots=True)
class Header:
    """What every back end agrees on."""

    format: str
    """Pillow's name: JPEG, PNG, WEBP, BMP, TIFF, PPM or JPEG2000."""
    width: int
    height: int
    size: int
    """Bytes of the encoded image."""
    orientation: int
    """Of EXIF, 1 to 8."""


def read_header(part: Part) -> Header:
    """Read the header of an image; raises Damage for what cannot be one.

    A JPEG and a WebP must also have their end, a PNG the right checksums up to its end. Of the
    other formats only the size is known: decode them to know more.
    """
    try:
        head = part.read(HEAD, 0)
        if not head:
            raise Damage("empty", "is empty")
        name = format_of(head)
        if name == "JPEG":
            width, height, orientation = read_jpeg(part, head)
            check_size(width, height)
        else:
            if name == "WEBP":
                check_webp(part, head)
            with part.stream() as stream, open_image(stream, name) as image:
                width, height = stored_size(image)
                if name == "PNG":
                    check_png(image, stream)
                    orientation = png_orientation(part)
                else:
                    orientation = orientation_of(image)
    except OSError as error:
        raise unreadable(error) from error
    return Header(name, width, height, part.size, orientation)


def check_webp(part: Part, head: bytes) -> None:
    """Raise Damage for a WebP without its end, and for metadata that DALI 2.4 does not find.

    A chunk of odd length has a byte behind it, which DALI forgets on its way to the EXIF.
    """
    if max(8 + int.from_bytes(head[4:8], "little"), MIN_WEBP) > part.size:
        raise Damage("truncated", "is truncated (a WebP without its end)")
    if head[12:16] != b"VP8X" or not head[20] & WEBP_EXIF:
        return
    at = 12
    for _ in range(MAX_SEGMENTS):
        chunk = part.read(8, at)
        if len(chunk) < 8 or chunk[:4] == b"EXIF":
            return
        size = int.from_bytes(chunk[4:], "little")
        if size % 2:
            what = f"EXIF behind a part of odd length, {chunk[:4].decode(errors='replace').strip()}"
            raise Damage("format", f"{NOT_ALL_READ.format('WebP')} ({what})")
        at += 8 + size


def png_orientation(part: Part) -> int:
    """Find the EXIF orientation of a PNG, before or behind its pixels."""
    at, exif = 8, b""
    while len(chunk := part.read(8, at)) == 8 and chunk[4:] != b"IEND":
        size = int.from_bytes(chunk[:4], "big")
        if chunk[4:] == b"eXIf":
            exif = part.read(size, at + 8)
        at += 12 + size
    return exif_orientation(exif)


def check_png(image: Image.Image, stream: BinaryIO) -> None:
    """Raise Damage unless all chunks of a PNG that was just opened are whole."""
    try:
        image.verify()
    except Exception as error:
        if stream.read(1):
            raise damage(error) from error
    if len(stream.read(4)) < 4:  # the checksum of IEND, which Pillow does not look at
        raise Damage("truncated", "is truncated (a PNG without its end)")


def format_of(head: bytes) -> str:
    """Return Pillow's name of the format; raises Damage for others and for what is no image."""
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if (name := named_by(MAGIC, head)) is not None:
        return name
    is_media = head[4:8] == b"ftyp"
    other = named_by(BRANDS, head[8:12]) if is_media else named_by(OTHERS, head)
    if other is not None:
        raise Damage("format", f"is no image that every back end reads ({other}, not {FORMATS})")
    raise Damage("junk", f"is no image ({FORMATS})")


def named_by(table: dict[str, tuple[bytes, ...]], head: bytes) -> str | None:
    return next((name for name, magic in table.items() if head.startswith(magic)), None)


def check_file(image: ImageFile, pixels: bool = False) -> Header:
    """Raise Damage for an image that a back end cannot read, as far as a quick look tells.

    JPEG, PNG and WebP: see `read_header`; with `pixels` they are decoded. The other formats are
    decoded in any case. In a shard, the tar header is checked, too.
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
            with part.stream() as stream, open_image(stream, header.format) as opened:
                read_pixels(opened)
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


def open_image(stream: BinaryIO, name: str) -> Image.Image:
    """Open an image of a known format without decoding it; to be closed.

    Raises Damage where Pillow cannot read the header, or DALI is known not to.
    """
    stream.seek(0)
    try:
        image = Image.open(stream, formats=(name,))
    except Exception as error:
        if name == "PNG" and isinstance(error, OSError) and not stream.read(1):
            raise Damage("truncated", "is truncated in its header") from error
        raise damage(error) from error
    check_size(*image.size)
    at = stream.tell()
    stream.seek(0)
    head = stream.read(HEAD)
    stream.seek(at)
    check_dali(image, head)
    return image


def check_dali(image: Image.Image, head: bytes) -> None:
    """Raise Damage for what Pillow reads and DALI 2.4 does not, or reads as other pixels.

    `head`: the first bytes of the file.
    """
    mode = image.mode
    if isinstance(image, TiffImageFile):
        compression = image.info.get("compression")
        bits = mode == "1" and compression == "raw"
        negative = mode.startswith("I;16") and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
        deep_cmyk = mode == "CMYK" and max(image.tag_v2.get(BITS, (8,))) > 8
        associated = ASSOCIATED in image.tag_v2.get(EXTRA_SAMPLES, ())
        if (
            bits
            or negative
            or deep_cmyk
            or associated
            or mode in UNEQUAL_TIFFS
            or compression in ("lzma", "webp")
        ):
            raise Damage("format", f"{NOT_ALL_READ.format('TIFF')} ({compression}, mode {mode})")
        try:
            _ = image.n_frames  # Pillow reads the headers of all pages, as DALI does at once
        except Exception as error:
            raise Damage("corrupt", "cannot be decoded (its list of pages)") from error
    elif image.format == "JPEG2000" and (mode in ("LA", "CMYK") or has_luma(head)):
        what = {"LA": "two channels", "CMYK": "CMYK"}.get(mode, "YCbCr")
        raise Damage("format", f"{NOT_ALL_READ.format('JPEG 2000')} ({what})")
    elif image.format == "PPM" and (most := largest_value(head)) not in (255, 65535):
        raise Damage("format", f"{NOT_ALL_READ.format('PNM')} (white is {most}, not 255 or 65535)")


def has_luma(head: bytes) -> bool:
    """Whether the first bytes of a JPEG 2000 say that its channels are YCbCr."""
    box = head.find(b"colr")
    return box >= 0 and head[box + 4 : box + 5] == b"\1" and head[box + 7 : box + 11] == LUMA


def largest_value(head: bytes) -> int:
    """Return the value that is white in a PNM, of its first bytes; 255 for a bitmap."""
    words = re.sub(rb"#[^\r\n]*", b"", head).split(maxsplit=4)
    return 255 if words[0] in (b"P1", b"P4") or len(words) < 4 else int(words[3])


def read_pixels(image: Image.Image) -> None:
    """Decode the image; raises Damage if that cannot be done."""
    try:
        image.load()
    except Exception as error:
        raise damage(error) from error


def damage(error: Exception) -> Damage:
    """Translate an exception of Pillow into what it says about the file."""
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
