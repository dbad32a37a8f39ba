"""The structure of JPEG, PNG and WebP files: image size, and whether the end is there.

Nothing is decoded; a few KB of a file are read.
"""

from __future__ import annotations

import struct
import zlib

from pipelines.damage import MAX_PIXELS, Damage
from pipelines.parts import Part

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
"""Markers that have no place between the segments of a header."""
SCAN = 0xDA


def jpeg_size(part: Part, head: bytes) -> tuple[int, int]:
    """(width, height): the segments up to the first scan, then the end marker."""
    at, base = 2, 0  # the segment's place in the file, and where `head` begins
    width = height = -1
    for _ in range(MAX_SEGMENTS):
        if at - base + 9 > len(head):
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
            if precision != 8:
                raise Damage("format", f"is a JPEG of {precision} bits a sample, which must be 8")
            if max(width, height) > MAX_JPEG_SIDE and width * height <= MAX_PIXELS:
                raise Damage("too-large", f"has a side of more than {MAX_JPEG_SIDE:,} pixels")
        at += 2 + length
        if marker == SCAN:
            if width < 0:
                raise Damage("corrupt", "cannot be decoded (a scan before the frame's header)")
            check_jpeg_end(part, head if base == 0 else b"", at)
            return width, height
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


def png_size(part: Part, head: bytes) -> tuple[int, int]:
    """(width, height): the first chunk, then the last one."""
    if len(head) < 33:
        raise Damage("truncated", "is truncated in its header")
    if head[12:16] != b"IHDR" or head[29:33] != zlib.crc32(head[12:29]).to_bytes(4, "big"):
        raise Damage("corrupt", "cannot be decoded (a PNG without a valid IHDR)")
    width, height = struct.unpack_from(">II", head, 16)
    tail = head[-12:-4] if len(head) == part.size else part.read(8, part.size - 12)
    if tail != b"\0\0\0\0IEND":
        check_png_end(part)
    return width, height


def check_png_end(part: Part) -> None:
    """Raise Damage unless the chunks lead to a whole IEND; anything may follow it."""
    at = 8
    for _ in range(MAX_SEGMENTS):
        head = part.read(8, at)
        if len(head) < 8:
            break
        length, name = struct.unpack(">I4s", head)
        at += 12 + length
        if name == b"IEND" and at <= part.size:
            return
    raise Damage("truncated", "is truncated (a PNG without its end)")


def webp_size(part: Part, head: bytes) -> tuple[int, int]:
    """(width, height): the first chunk, and the lengths of all."""
    if len(head) < 30:
        raise Damage("truncated", "is truncated in its header")
    end = 8 + int(struct.unpack_from("<I", head, 4)[0])
    at = 12
    for _ in range(MAX_SEGMENTS):
        if at >= end:
            break
        length = part.read(4, at + 4)
        at += 8 + int.from_bytes(length, "little")
        if at > min(end, part.size) or len(length) < 4:
            raise Damage("truncated", "is truncated (a WebP without its end)")
        at += at % 2
    kind = head[12:16]
    if kind == b"VP8X":
        width, height = head[24:27], head[27:30]
        return 1 + int.from_bytes(width, "little"), 1 + int.from_bytes(height, "little")
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise Damage("corrupt", "cannot be decoded (a WebP without an image)")
