"""A reader of tar archives that trusts nothing: plain files only, nothing is written or followed.

Python's tarfile reads the long names and extended headers of a hostile archive into memory at
whatever size they declare; here a header is 512 bytes and a declared size is only compared.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipelines.errors import UserError

BLOCK = tarfile.BLOCKSIZE
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
PASSED_OVER = (tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE)
"""Folders, and extended headers: times and the like. Where one of these gives a longer name or
another size, the plain header below it is what counts here."""
CHUNK = 1 << 20
Archive = IO[bytes] | gzip.GzipFile
"""Opened for reading; a compressed one is slow to go back in."""


@dataclass(frozen=True)
class Member:
    """A plain file in an archive."""

    name: str
    """As the archive has it: anything, `../` too."""
    start: int
    """Where its bytes begin in the file that is read, in bytes."""
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def read_members(
    archive: Archive, name: str, start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """The plain files of the archive that lies in `archive` from byte `start` to `end`, in order.

    `name` is how errors call it. None for `end`: unknown, as in a compressed file. Raises
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
    """The bytes of a member in pieces of at most 1 MiB. UserError if they end early."""
    archive.seek(member.start)
    left = member.size
    while left:
        piece = archive.read(min(left, CHUNK))
        if not piece:
            raise UserError(f"{name} ends within {member.name!r}: download it again")
        left -= len(piece)
        yield piece


@contextmanager
def open_gzip(path: Path) -> Iterator[gzip.GzipFile]:
    """A compressed archive for reading; damage is a UserError in the block or at its end."""
    try:
        with gzip.open(path) as file:
            yield file
            while file.read(CHUNK):  # the checksum is at the end
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None
