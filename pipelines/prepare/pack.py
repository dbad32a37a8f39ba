"""One shard: planned from names and sizes alone, then written or found to be there already."""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.damage import Damage
from pipelines.errors import UserError
from pipelines.files import written_in
from pipelines.headers import open_file
from pipelines.shard_format import index_text, layout
from pipelines.shard_manifest import index_name


@dataclass(frozen=True, eq=False)
class Plan:
    """What a shard is to hold, in order."""

    file: str
    """train-00000.tar and so on."""
    paths: list[str]
    """Of the image files."""
    names: list[str]
    """Of the members."""
    sizes: NDArray[np.int64]
    labels: NDArray[np.int32]
    sha256: str | None = None
    """Of the tar file, where it was written by an earlier call."""

    def index(self) -> bytes:
        return index_text(self.names, self.sizes, self.labels).encode("ascii")


@dataclass(frozen=True)
class Packed:
    """A shard that is whole."""

    file: str
    sha256: str
    written: bool
    """False: it was there."""


def pack(dst: Path, scratch: Path, plan: Plan) -> Packed:
    """Make sure that a shard and its index are in `dst`.

    Raises UserError for an image file that is not what was planned, OSError for a full disk.
    """
    path = dst / plan.file
    found = checksum_if_whole(path, plan)
    if found is not None and found == (plan.sha256 or found):
        return Packed(plan.file, found, written=False)
    with written_in(scratch, path) as file:
        write_tar(file, plan)
        file.flush()
        os.fsync(file.fileno())
        written = checksum(Path(file.name))
    with written_in(scratch, path.with_name(index_name(plan.file))) as file:
        file.write(plan.index())
    return Packed(plan.file, written, written=True)


def checksum_if_whole(path: Path, plan: Plan) -> str | None:
    """SHA-256 of a shard that an earlier call has written from the same files, None if it has not.

    The index, which is written last, must be the planned one, and no image newer than the shard.
    """
    try:
        status = path.stat()
        if path.with_name(index_name(plan.file)).read_bytes() != plan.index():
            return None
        newest = max(os.stat(image).st_mtime_ns for image in plan.paths)
    except FileNotFoundError:
        return None
    if status.st_size != layout(plan.sizes)[2] or status.st_mtime_ns < newest:
        return None
    return checksum(path)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tar(file: BinaryIO, plan: Plan) -> None:
    """Write all members; the same plan and images give the same bytes."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, name, size, label in zip(
            plan.paths, plan.names, plan.sizes.tolist(), plan.labels.tolist(), strict=True
        ):
            image, found = open_image(path)
            with image:
                if found != size:
                    raise UserError(f"{path} has changed since it was looked at: call again")
                tar.addfile(member_info(name, size), image)
            digits = str(label).encode()
            tar.addfile(member_info(f"{name.rpartition('.')[0]}.cls", len(digits)), BytesIO(digits))


def open_image(path: str) -> tuple[BinaryIO, int]:
    """The file and its size in bytes."""
    try:
        file, status = open_file(path)
    except Damage as damage:
        raise UserError(f"{path} {damage}: it has changed since it was looked at") from None
    return open(file, "rb"), status.st_size


def member_info(name: str, size: int) -> tarfile.TarInfo:
    """A plain file of nobody's, from no time."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info
