"""The bytes of one image in an open file: all of it, or a part of a shard."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER = 1 << 16
"""Bytes that a stream reads at a time."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes in an open file."""

    file: int
    """Its descriptor."""
    start: int
    size: int

    def read(self, count: int, at: int) -> bytes:
        """Up to `count` bytes from byte `at` of the part on; what lies behind it is not seen."""
        return os.pread(self.file, max(0, min(count, self.size - at)), self.start + at)

    def stream(self) -> BinaryIO:
        """The part as a file of its own; closing it leaves the descriptor open."""
        return cast(BinaryIO, io.BufferedReader(PartReader(self), BUFFER))


class PartReader(io.RawIOBase):
    """What `Part.stream` reads through."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.part.size)[whence]
        if self.at < 0:
            self.at = 0
            raise OSError("before the first byte")
        return self.at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data = self.part.read(len(view), self.at)
        view[: len(data)] = data
        self.at += len(data)
        return len(data)
