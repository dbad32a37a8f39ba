"""Describe the images of a split and where their bytes are, in tens of bytes an image."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import Damage
from pipelines.limits import system_limit


class ImageFile(NamedTuple):
    """An encoded image: a file of its own, or a part of a shard."""

    path: str
    """Of the file, or of the shard."""
    start: int = 0
    """Where the image begins in it, in bytes."""
    size: int | None = None
    """Bytes of the image; None: the whole file."""
    name: str = ""
    """Of the member of a shard."""

    def __str__(self) -> str:
        """Return the name that errors use."""
        return f"{self.path}:{self.name}" if self.name else self.path

    def open(self) -> BinaryIO:
        """Open the encoded image; raises what `read` does."""
        return open(self.path, "rb") if self.size is None else io.BytesIO(self.read())

    def read(self) -> bytes:
        """Read the encoded image. Raises OSError, and EOFError for a shard that is too short."""
        with open(self.path, "rb", buffering=0) as file:
            if self.size is None:
                return file.readall()
            data = os.pread(file.fileno(), self.size, self.start)
        if len(data) < self.size:
            raise EOFError(f"{self.path} ends within {self.name}")
        return data


@dataclass(frozen=True, eq=False)
class Images(Sequence[ImageFile]):
    """The images of folders or shards as arrays; an `ImageFile` is made when it is asked for."""

    holders: tuple[str, ...]
    """Paths of the folders, or of the shards."""
    holder: NDArray[np.int32]
    """(N,): index in `holders` of the one that holds the image."""
    names: NDArray[np.uint8]
    """The names of all images, concatenated, as the file system has them."""
    name_start: NDArray[np.int64]
    """(N,): where an image's name begins."""
    name_size: NDArray[np.int32]
    """(N,): bytes of the name."""
    start: NDArray[np.int64] | None = None
    """Of shards, (N,): where the image begins, in bytes."""
    size: NDArray[np.int64] | None = None
    """Of shards, (N,): bytes of the image."""

    @classmethod
    def packed(
        cls,
        holders: Iterable[str],
        names: Iterable[Iterable[str | bytes]],
        **parts: NDArray[np.int64],
    ) -> Images:
        """Pack the names of the images of each holder; `parts`: `start` and `size` of shards."""
        blobs, sizes, counts = [], [], []
        for group in names:  # one at a time: a million strings take much memory
            encoded = [os.fsencode(name) for name in group]
            blobs.append(b"".join(encoded))
            sizes.append(np.array([len(name) for name in encoded], np.int32))
            counts.append(len(encoded))
        name_size = np.concatenate(sizes)
        return cls(
            holders=tuple(holders),
            holder=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            names=np.frombuffer(b"".join(blobs), np.uint8),
            name_start=np.cumsum(name_size, dtype=np.int64) - name_size,
            name_size=name_size,
            **parts,
        )

    def __len__(self) -> int:
        return len(self.holder)

    @overload
    def __getitem__(self, index: int) -> ImageFile: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...
    def __getitem__(self, index: int | slice) -> ImageFile | Images:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        holder, name = self.holders[self.holder[index]], self.name(index)
        if self.start is None or self.size is None:
            return ImageFile(f"{holder}/{name}")
        return ImageFile(holder, int(self.start[index]), int(self.size[index]), name)

    def name(self, index: int) -> str:
        """Return the name of an image in its folder or shard."""
        start = self.name_start[index]
        return os.fsdecode(self.names[start : start + self.name_size[index]].tobytes())

    def names_below(self, folder: str) -> list[bytes]:
        """List the names of all images as the file system has them: of files their paths from
        `folder` on, of a shard's images those of its members."""
        names = self.names.tobytes()
        starts, sizes = self.name_start.tolist(), self.name_size.tolist()
        own = [names[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        if self.size is not None:
            return own
        below = [os.path.relpath(holder, folder) for holder in self.holders]
        before = [b"" if path == "." else os.fsencode(f"{path}/") for path in below]
        return [before[i] + name for i, name in zip(self.holder.tolist(), own, strict=True)]

    def take(self, indices: NDArray[np.int64]) -> Images:
        """Select the images at these indices, in this order."""
        return Images(
            self.holders,
            self.holder[indices],
            self.names,
            self.name_start[indices],
            self.name_size[indices],
            None if self.start is None else self.start[indices],
            None if self.size is None else self.size[indices],
        )


def whole_files(paths: Iterable[str]) -> list[ImageFile]:
    """List images that are files of their own, in whatever folders."""
    return [ImageFile(path) for path in paths]


@dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes in an open file."""

    file: int
    """Its descriptor."""
    start: int
    """In bytes; 0: the part is the whole file."""
    size: int

    def read(self, count: int, offset: int) -> bytes:
        """Read up to `count` bytes from `offset` in the part on, and none from behind it."""
        return os.pread(self.file, max(0, min(count, self.size - offset)), self.start + offset)

    def stream(self) -> BinaryIO:
        """Open the part as a file of its own; closing it leaves the descriptor open."""
        if self.start == 0:
            return open(self.file, "rb", closefd=False)
        return io.BytesIO(self.read(self.size, 0))


def open_file(path: str | bytes) -> tuple[int, os.stat_result]:
    """Open a file without waiting, as on a FIFO; returns the descriptor and status.

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


def status_of(path: Path) -> os.stat_result | None:
    """Return the status of a file, None where it cannot be read."""
    try:
        return os.stat(path)
    except OSError:
        return None


def changed_ns(status: os.stat_result) -> int:
    """Return when a file last changed, in ns: its content, or what lies under its name."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


def unreadable(error: OSError) -> Damage:
    """Return what is wrong with the file. Raises `error` where the system lacks something else,
    such as open files: the image is as good as any other."""
    if system_limit(error):
        raise error
    return Damage("unreadable", f"cannot be read ({error.strerror})")


class PassedOver(NamedTuple):
    """What lies among the images and is not read: how much, and the path that sorts first."""

    loose: int = 0
    """Files beside the class folders, which torchvision leaves out, too."""
    first_loose: str = ""
    metadata: int = 0
    """Files and folders that systems and programs leave, hidden ones among them."""
    first_metadata: str = ""


NOTHING = PassedOver()


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a split in the order of its folders or shards."""

    images: Images
    labels: NDArray[np.int32]
    """(N,): index in `classes` of each image's class."""
    classes: tuple[str, ...]
    passed_over: PassedOver = NOTHING
