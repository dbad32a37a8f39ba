"""The code for GPUs in a shared library, and how to leave out that for other ones.

A library holds containers ("fatbins"), each of entries of one kind for one architecture: machine
code, or PTX, which the driver can compile for later ones.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = struct.pack("<I", 0xBA55ED50)
CONTAINER = struct.Struct("<IHHQ")
"""Magic number, version, bytes of this header, bytes of all entries."""
ENTRY = struct.Struct("<HHIQ")
"""Kind, version, bytes of this header, bytes of the code behind it."""
ARCHITECTURE, ARCHITECTURE_AT = struct.Struct("<I"), 28
"""Behind the start of an entry: 90 for compute capability 9.0."""
MACHINE_CODE = 2
LARGEST_HEADER = 4096
"""More than any entry has: what asks for more is none."""


@dataclass(frozen=True)
class Entry:
    """Code of one kind for one architecture."""

    kind: int
    architecture: int
    start: int
    """Of the code, in bytes from the start of the library."""
    size: int


def containers(library: bytes) -> Iterator[list[Entry]]:
    """Yield the entries of each container, as far as they can be read."""
    at = library.find(MAGIC)
    while at >= 0:
        end = at + len(MAGIC)
        if at + CONTAINER.size <= len(library):
            _, version, header, size = CONTAINER.unpack_from(library, at)
            if (version, header) == (1, CONTAINER.size) and at + header + size <= len(library):
                end = at + header + size
                yield list(entries(library, at + header, end))
        at = library.find(MAGIC, end)


def entries(library: bytes, at: int, end: int) -> Iterator[Entry]:
    """Yield the entries between two places of a container."""
    while at + ARCHITECTURE_AT + ARCHITECTURE.size <= end:
        kind, _, header, size = ENTRY.unpack_from(library, at)
        if not ENTRY.size <= header <= LARGEST_HEADER or at + header + size > end:
            return
        (architecture,) = ARCHITECTURE.unpack_from(library, at + ARCHITECTURE_AT)
        yield Entry(kind, architecture, at + header, size)
        at += header + size


def blanked(library: bytes, architecture: int) -> bytes:
    """Return the library, as long as it was, with zeros in place of all code but the machine code
    for one architecture, such as 90; a container that has none of it stays as it is."""
    found = bytearray(library)
    for container in containers(library):
        kept = [(one.kind, one.architecture) == (MACHINE_CODE, architecture) for one in container]
        if any(kept):
            for one, keep in zip(container, kept, strict=True):
                if not keep:
                    found[one.start : one.start + one.size] = bytes(one.size)
    return bytes(found)
