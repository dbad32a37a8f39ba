"""Examine one image file, in a worker process that is bounded in memory and CPU time."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from pipelines.datasets.checks import (
    MAX_PIXELS,
    WHOLE,
    Header,
    open_image,
    read_header,
    read_pixels,
)
from pipelines.datasets.images import Part, open_file
from pipelines.datasets.pixels import metadata
from pipelines.errors import Damage

MAX_MEMORY = 4 << 30
"""Bytes of address space that a process which examines files may have."""
MAX_SECONDS = 120
"""Of CPU time for one file; then its process is ended."""
ENDS = 4096
"""Bytes at both ends of a file that are hashed; all of it is only where two files' ends agree."""
THIN = 20
"""Long side / short side from which an image is worth a note."""
TINY = 8
"""Pixels of the short side below which it is."""
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".j2c", ".jpx", ".jpf"),
}
Finding = tuple[str, str]
"""A kind of `findings.py`, and details that continue a sentence that begins with the path."""


class Examined(NamedTuple):
    """The result for one file."""

    size: int
    """Bytes; -1 where it cannot be opened."""
    mtime_ns: int
    decoded: bool
    """Whether all pixels were read, not only the header."""
    ends: str
    """A hash of its ends; empty for damaged files."""
    findings: tuple[Finding, ...]
    digest: str = ""
    """A hash of all of the file, where others of its size have the same ends."""


def examine_all(root: Path, decode: bool, names: list[str]) -> list[tuple[str, Examined]]:
    """Examine files below `root`; bounds the memory and CPU time of the process from then on."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    bound = MAX_MEMORY if hard == resource.RLIM_INFINITY else min(MAX_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    examined = []
    for name in names:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        examined.append((name, examine(os.path.join(root, name), decode)))
    signal.setitimer(signal.ITIMER_PROF, 0)
    return examined


def examine(path: str, decode: bool) -> Examined:
    """Read the header, and with `decode` every pixel; a damaged file is a finding."""
    try:
        file, status = open_file(path)
    except Damage as damage:
        return Examined(-1, -1, decode, "", ((damage.kind, damage.text),))
    size, mtime = status.st_size, status.st_mtime_ns
    with open(file, "rb") as stream:
        try:
            header = read_header(Part(file, 0, size))
            findings = notes_on_name(path, header) + notes_on_image(stream, header, decode)
            return Examined(size, mtime, decode, hash_of_ends(file, size), tuple(findings))
        except Damage as damage:
            return Examined(size, mtime, decode, "", ((damage.kind, damage.text),))


def notes_on_image(stream: BinaryIO, header: Header, decode: bool) -> list[Finding]:
    """Note what is odd about an image, by Pillow; raises Damage."""
    with open_image(stream, header.format) as image:
        bits = bits_of(stream, image)
        if decode or header.format not in WHOLE:
            read_pixels(image)
        return notes_on_look(image, bits, header.orientation)


def notes_on_look(image: Image.Image, bits: int, orientation: int) -> list[Finding]:
    """Note what is odd about the colours and the shape of an image."""
    mode, (width, height) = image.mode, image.size
    grey = mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")
    alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    frames = metadata(lambda: getattr(image, "n_frames", 1), 1)
    pixels = f"has {width} x {height} pixels"
    rotated = f"has EXIF orientation {orientation}: applied where the recipe is upright"
    notes = (
        (grey, "greyscale", ""),
        (bits > 8, "16-bit", f"has {bits} bits a sample: 8 are used"),
        (mode == "CMYK", "cmyk", ""),
        (mode in ("P", "PA"), "palette", ""),
        (alpha, "alpha", ""),
        (frames > 1, "animated", f"has {frames} frames: the first is read"),
        (2 * width * height > MAX_PIXELS, "large", f"has {width:,} x {height:,} pixels"),
        (max(width, height) > THIN * min(width, height), "thin", pixels),
        (min(width, height) < TINY, "tiny", pixels),
        (orientation > 1, "exif-rotated", rotated),
    )
    return [(kind, text) for holds, kind, text in notes if holds]


def notes_on_name(path: str, header: Header) -> list[Finding]:
    notes = []
    if os.path.splitext(path)[1].lower() not in SUFFIXES[header.format]:
        notes.append(("wrong-suffix", f"is {header.format}: read as such"))
    try:
        path.encode()
    except UnicodeEncodeError:
        notes.append(("name", ""))
    return notes


def bits_of(stream: BinaryIO, image: Image.Image) -> int:
    """Return the bits of a sample."""
    if image.format == "PNG":
        return os.pread(stream.fileno(), 1, 24)[0]
    if isinstance(image, TiffImageFile):
        return metadata(lambda: max(image.tag_v2.get(258, (1,))), 8)
    return {"I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)


def hash_of_ends(file: int, size: int) -> str:
    """Hash both ends of a file; of files up to two ENDS that is all of it."""
    digest = hashlib.blake2b(os.pread(file, ENDS, 0), digest_size=16)
    if size > ENDS:
        digest.update(os.pread(file, ENDS, max(ENDS, size - ENDS)))
    return digest.hexdigest()
