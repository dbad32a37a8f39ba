"""Damaged and odd files, made from a real photograph, with what a scan has to say of each."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ARITHMETIC = """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+
MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09P
T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAkADADAREAAhEBAxEB/8wACgAQEAUBEBEF
/9oADAMBAAIRAxEAPwD/AEEi2TDaZICWdoZe9Vy54gMedngypzh1TRmk4Rlm0INM7mKc7YzQQWW1fIbVkhrg
klNcNL/56t1Gd8nyRfXQFolDM4pkVtjPSuAYbsyz2oEqdTVViAws2EHFz7aITIO3XsOHw8xO+djTvdYesJlP
zYNyWOPkxWQq2IbHyK6mr2HkRN31gwvfg/ltnx5zjXBfhA8srZvBRbjQKRJUfvsUk+nfW+wzNP8A/LO96KSb
d2fRzvGYY6F8lQh9CWGrVQjCBW3P5ezNsFW2j7n1GMtSbB7uMQSyeckohXAQ7iwEMmp8eQnCNlq7mBOFLwGz
g52/TKd6XZ98SjlirjfyxN8gP0VdqvqObElbKrGjsI1G6QBpfgpPE4HuS6wWu8GX/mrY2jxs5kuQj3m7gEnk
Xh94bprfECk86Psy7/wjJDoO2ohgM5Bn6EEdGmIczS4zlcFin3eHmcHbfIPUw446YP/Z
"""
"""48x36 px of n01440764_tench by jpegtran -arithmetic, libjpeg-turbo 2.1.5; Pillow writes none."""


@dataclass(frozen=True)
class Odd:
    """One file."""

    name: str
    content: bytes | None
    """None for what is no file with content: see `write_special`."""
    kinds: tuple[str, ...] = ()
    """What a scan that decodes finds, sorted."""
    hidden: bool = False
    """Only decoding shows it: the header and the end look right."""


def write_odd_files(folder: Path, photograph: Path) -> dict[str, Odd]:
    """Write all of them into a folder; those that the system does not allow are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    odd = {file.name: file for file in odd_files(photograph)}
    for name, file in list(odd.items()):
        if file.content is not None:
            (folder / name).write_bytes(file.content)
        elif name == "no-permission.jpg" and os.geteuid() == 0:
            del odd[name]  # root may read everything
        else:
            write_special(folder / name)
    return odd


def write_special(path: Path) -> None:
    """What is no file with content, by its name."""
    if path.name == "folder.jpg":
        path.mkdir()
    elif path.name == "fifo.jpg":
        os.mkfifo(path)
    elif path.name == "loop.jpg":
        path.symlink_to(path.name)
    elif path.name == "dangling.jpg":
        path.symlink_to("nowhere.jpg")
    else:
        assert path.name == "no-permission.jpg", path
        path.write_bytes(b"anything")
        path.chmod(0)


def odd_files(photograph: Path) -> Iterator[Odd]:
    """All of them; `photograph` is a JPEG of at least 40 KB."""
    whole = photograph.read_bytes()
    assert len(whole) > 40_000 and whole[-2:] == b"\xff\xd9"
    with Image.open(photograph) as image:
        pixels = image.convert("RGB")
    small = pixels.resize((128, 96))
    yield from broken_jpegs(whole, encode(pixels, "JPEG", progressive=True))
    yield from odd_jpegs(small, whole)
    yield from no_images(whole)
    yield from other_formats(small)
    yield from broken_pngs(small)
    yield from colours_and_frames(small)
    yield from sizes(pixels, whole)
    yield from orientations(small)
    yield from names(encode(small, "JPEG"))


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def broken_jpegs(whole: bytes, progressive: bytes) -> Iterator[Odd]:
    scan = whole.index(b"\xff\xda")
    for tenths in range(1, 10):
        part = whole[: len(whole) * tenths // 10]
        yield Odd(f"truncated-{tenths}0.jpg", part, ("truncated",))
    half = len(progressive) // 2
    yield Odd("progressive-truncated.jpg", progressive[:half], ("truncated",))
    yield Odd("end-marker-missing.jpg", whole[:-2], ("truncated",))
    yield Odd("one-byte-missing.jpg", whole[:-1], ("truncated",))
    zeros = bytes(len(whole) // 2)
    yield Odd("second-half-zero.jpg", whole[: -len(zeros)] + zeros, ("truncated",))
    yield Odd("header-only.jpg", whole[:scan], ("truncated",))
    yield Odd("magic-only.jpg", whole[:3], ("truncated",))
    yield Odd("stray-bytes.jpg", whole[:20] + b"\0\0" + whole[20:], ("corrupt",))
    yield Odd("two-starts.jpg", whole[:2] + whole, ("corrupt",))
    frame = whole.index(b"\xff\xc0")
    yield Odd("12-bit.jpg", whole[: frame + 4] + b"\x0c" + whole[frame + 5 :], ("format",))
    tables = whole.index(b"\xff\xc4")
    counts = bytes(16) + b"\xff"
    flipped = whole[: tables + 5] + counts + whole[tables + 22 :]
    yield Odd("bit-flips-in-tables.jpg", flipped, ("corrupt",), hidden=True)


def odd_jpegs(small: Image.Image, whole: bytes) -> Iterator[Odd]:
    yield Odd("plain.jpg", whole)
    yield Odd("progressive.jpg", encode(small, "JPEG", progressive=True))
    yield Odd("arithmetic.jpg", base64.b64decode(ARITHMETIC))
    yield Odd("restart-markers.jpg", encode(small, "JPEG", restart_marker_rows=1))
    yield Odd("cmyk.jpg", encode(small.convert("CMYK"), "JPEG"), ("cmyk",))
    yield Odd("grey.jpg", encode(small.convert("L"), "JPEG"), ("greyscale",))
    yield Odd("trailer.jpg", whole + b"appended by a camera" * 500)
    yield Odd("fill-bytes.jpg", whole[:2] + b"\xff\xff\xff" + whole[2:])
    comment = b"\xff\xfe\xea\x62" + bytes(60_000)
    yield Odd("long-header.jpg", whole[:2] + 20 * comment + whole[2:])


def no_images(whole: bytes) -> Iterator[Odd]:
    yield Odd("empty.jpg", b"", ("empty",))
    yield Odd("text.jpg", b"404 Not Found\n" * 50, ("junk",))
    yield Odd("page.jpg", b"<!DOCTYPE html><html><body>gone</body></html>", ("junk",))
    yield Odd("zeros.jpg", bytes(5000), ("junk",))
    yield Odd("begins-late.jpg", b"\0" + whole, ("junk",))
    yield Odd("sound.webp", b"RIFF\x24\0\0\0WAVEfmt " + bytes(24), ("junk",))
    yield Odd("stub.webp", b"RIFF\x08\0\0\0WEBPVP8X", ("truncated",))
    yield Odd("folder.jpg", None)
    yield Odd("fifo.jpg", None, ("not-a-file",))
    yield Odd("loop.jpg", None, ("unreadable",))
    yield Odd("dangling.jpg", None, ("unreadable",))
    yield Odd("no-permission.jpg", None, ("unreadable",))


def other_formats(small: Image.Image) -> Iterator[Odd]:
    for file_format in ("PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"):
        content = encode(small, file_format)
        yield Odd(f"{file_format.lower()}-named.JPEG", content, ("wrong-suffix",))
        verdict = "corrupt" if file_format == "JPEG2000" else "truncated"
        part = content[: len(content) * 6 // 10]
        yield Odd(f"{file_format.lower()}-truncated.{file_format.lower()}", part, (verdict,))
    yield Odd("gif-named.JPEG", encode(small, "GIF"), ("format",))
    yield Odd("telephone.heic", b"\0\0\0\x18ftypheic" + bytes(500), ("format",))
    bits = encode(small.convert("1"), "TIFF")
    yield Odd("bits.tif", bits, ("format",))
    yield Odd("no-suffix", encode(small, "PNG"), ("wrong-suffix",))


def chunk(name: bytes, data: bytes, wrong: int = 0) -> bytes:
    """One of a PNG."""
    checksum = zlib.crc32(name + data) ^ wrong
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def broken_pngs(small: Image.Image) -> Iterator[Odd]:
    whole = encode(small, "PNG")
    yield Odd("end-missing.png", whole[:-12], ("truncated",))
    yield Odd("last-bytes-missing.png", whole[:-2], ("truncated",))
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    yield Odd("bit-flip-in-pixels.png", flipped, ("corrupt",))
    checksum = whole[:-16] + bytes(4) + whole[-12:]
    yield Odd("wrong-checksum.png", checksum, ("corrupt",))
    yield Odd("bit-flip-in-header.png", whole[:17] + b"\1" + whole[18:], ("corrupt",))
    yield Odd("trailer.png", whole + b"appended")
    bomb = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000)))
    yield Odd("text-bomb.png", whole[:-12] + bomb + whole[-12:], ("corrupt",), hidden=True)


def colours_and_frames(small: Image.Image) -> Iterator[Odd]:
    grey = np.asarray(small.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    yield Odd("16-bit-grey.png", encode(deep, "PNG"), ("16-bit", "greyscale"))
    samples = np.asarray(small).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    yield Odd("16-bit-colour.png", png(128, 96, 16, 2, rows), ("16-bit",))
    palette = small.convert("P")
    yield Odd("palette.png", encode(palette, "PNG"), ("palette",))
    clear = encode(palette, "PNG", transparency=3)
    yield Odd("palette-clear.png", clear, ("alpha", "palette"))
    yield Odd("alpha.png", encode(small.convert("RGBA"), "PNG"), ("alpha",))
    yield Odd("grey-alpha.png", encode(small.convert("LA"), "PNG"), ("alpha", "greyscale"))
    yield Odd("one-bit.png", encode(small.convert("1"), "PNG"), ("greyscale",))
    veiled = small.convert("RGBA")
    veiled.putalpha(128)
    yield Odd("alpha.webp", encode(veiled, "WEBP"), ("alpha",))
    yield Odd("lossless.webp", encode(small, "WEBP", lossless=True))
    frames = {"save_all": True, "append_images": [small.rotate(90), small.rotate(180)]}
    yield Odd("film.gif", encode(small, "GIF", **frames), ("format",))
    yield Odd("film.webp", encode(small, "WEBP", **frames), ("animated",))
    yield Odd("film.png", encode(small, "PNG", **frames), ("animated",))
    yield Odd("two-pages.tif", encode(small, "TIFF", **frames), ("animated",))
    yield Odd("stereo.jpg", encode(small, "MPO", **frames), ("animated",))


def sizes(pixels: Image.Image, whole: bytes) -> Iterator[Odd]:
    def sized(width: int, height: int) -> bytes:
        return encode(pixels.resize((width, height)), "JPEG")

    yield Odd("1x1.jpg", sized(1, 1), ("tiny",))
    yield Odd("1x1.png", encode(pixels.resize((1, 1)), "PNG"), ("tiny",))
    yield Odd("20000x10.jpg", sized(20_000, 10), ("thin",))
    yield Odd("10x20000.jpg", sized(10, 20_000), ("thin",))
    yield Odd("65000x1.jpg", sized(65_000, 1), ("too-thin",))
    one_colour = Image.new("RGB", (10_000, 10_000), (200, 100, 50))
    yield Odd("100-megapixels.jpg", encode(one_colour, "JPEG"), ("large",))
    yield Odd("200-megapixels.png", png(20_000, 10_000, 1, 0, bytes(25_010_000)), ("too-large",))
    yield Odd("claims-60000x60000.png", png(60_000, 60_000, 8, 2, bytes(9)), ("too-large",))
    frame = whole.index(b"\xff\xc0") + 5
    for side, kind in ((65_000, "too-large"), (0, "corrupt")):
        claim = whole[:frame] + struct.pack(">HH", side, side) + whole[frame + 4 :]
        yield Odd(f"claims-{side}x{side}.jpg", claim, (kind,))
    yield Odd("claims-60000x60000.ppm", b"P6 60000 60000 255\n" + bytes(900), ("too-large",))


def orientations(small: Image.Image) -> Iterator[Odd]:
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        kinds = ("exif-rotated",) if orientation > 1 else ()
        yield Odd(f"exif-{orientation}.jpg", encode(small, "JPEG", exif=exif), kinds)
    yield Odd("exif.png", encode(small, "PNG", exif=exif), ("exif-rotated",))
    yield Odd("exif.webp", encode(small, "WEBP", exif=exif), ("exif-rotated",))
    damaged = (
        encode(small, "JPEG", exif=exif).replace(b"MM\0*", b"MX\0*").replace(b"II*\0", b"IX*\0")
    )
    yield Odd("exif-damaged.jpg", damaged)


def names(content: bytes) -> Iterator[Odd]:
    yield Odd("na\u00efve \u5199\u771f \u0444\u043e\u0442\u043e.jpg", content)
    yield Odd("x" * 251 + ".jpg", content)
    yield Odd("number #1.jpg", content)
    yield Odd('"quoted".jpg', content)
    yield Odd("two\nlines.jpg", content)
    yield Odd(" blanks .jpg ", content, ("wrong-suffix",))
    yield Odd(os.fsdecode(b"latin-\xe9.jpg"), content, ("name",))
    yield Odd("number #2.jpg", content[:600], ("truncated",))
    yield Odd('"quoted" and\nbroken.jpg', content[:600], ("truncated",))
    yield Odd(os.fsdecode(b"latin-\xe9-broken.jpg"), content[:600], ("truncated",))
