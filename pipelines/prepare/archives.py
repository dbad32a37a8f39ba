"""Read tar archives that are not trusted: plain files only, no link is followed.

Python's tarfile reads the long names and extended headers of a hostile archive into memory at
whatever size they declare, and takes a damaged header for the archive's end; here a header is 512
bytes, a declared size is only compared, and damage is an error.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipelines.datasets.folders import class_names, visible
from pipelines.errors import UserError

BLOCK = tarfile.BLOCKSIZE
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
PASSED_OVER = (tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE)
"""Folders, and extended headers: times and the like. Where one of these gives a longer name or
another size, the plain header below it is what counts here."""
CHUNK = 1 << 20
SMALL = 64 << 20
"""Bytes that a file of the devkit or of CIFAR-10 may have; the largest has 31 million."""
Archive = IO[bytes] | gzip.GzipFile
"""Opened for reading; a compressed one is slow to go back in."""


@dataclass(frozen=True)
class Member:
    """A plain file in an archive."""

    name: str
    """As in the archive: anything, even `../`."""
    start: int
    """Where its bytes begin in the file that is read, in bytes."""
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def read_members(
    archive: Archive, name: str, start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Yield the plain files of the archive between the bytes `start` and `end` of `archive`.

    Errors call it `name`. `end` is None where it is unknown, as in a compressed file. Raises
    UserError for damage and for links, devices and all else that is neither file nor folder.
    """
    offset = start
    while end is None or offset < end:
        archive.seek(offset)
        header = archive.read(BLOCK)
        if not header.strip(b"\0"):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise UserError(
                f"{name} is damaged at byte {offset - start:,} (no tar header): download it again"
            ) from None
        member = Member(info.name, offset + BLOCK, info.size)
        if info.size < 0 or (end is not None and member.end > end):
            raise UserError(
                f"{name} ends within {info.name!r}, which says it has {info.size:,} bytes: "
                "download it again"
            )
        if info.type in PLAIN:
            yield member
        elif info.type not in PASSED_OVER:
            raise UserError(
                f"{name}: {info.name!r} is refused: a plain file was expected, not a link, a "
                "device or the like"
            )
        offset = member.start + -(-info.size // BLOCK) * BLOCK


def read_bytes(archive: Archive, name: str, member: Member) -> Iterator[bytes]:
    """Yield the bytes of a member in chunks of at most 1 MiB. UserError if they end early."""
    archive.seek(member.start)
    left = member.size
    while left:
        piece = archive.read(min(left, CHUNK))
        if not piece:
            raise UserError(f"{name} ends within {member.name!r}: download it again")
        left -= len(piece)
        yield piece


def read_whole(archive: Archive, name: str, member: Member) -> bytes:
    """Read a member that is known to be small. UserError if it is large or ends early."""
    check_small(member.size, f"{name}: {member.name!r}")
    return b"".join(read_bytes(archive, name, member))


def check_small(size: int, where: str) -> None:
    if size > SMALL:
        raise UserError(f"{where} is refused: {size:,} bytes, where {SMALL:,} are the most")


@contextmanager
def open_gzip(path: Path) -> Iterator[gzip.GzipFile]:
    """Open a compressed archive; damage is a UserError in the block or at its end."""
    try:
        with gzip.open(path) as file:
            yield file
            while file.read(CHUNK):  # the checksum is at the end
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None


def check_counts(folder: Path, classes: Counter[str]) -> None:
    """Raise UserError unless each class folder has as many files as the archive has images."""
    found = {name: len(visible(folder / name)) for name in class_names(folder)}
    for name in sorted(found.keys() | classes.keys()):
        if found.get(name, 0) != classes[name]:
            raise UserError(
                f"{folder / name} has {found.get(name, 0):,} files where the archive has "
                f"{classes[name]:,}: remove what is not from it and call again"
            )
