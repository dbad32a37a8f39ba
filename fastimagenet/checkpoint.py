"""Checkpoints: written beside and renamed, sealed by a checksum, read without running any code.

The checksum is the comment of the zip archive that `torch.save` writes, so the file stays one that
`torch.load` reads; torch itself overlooks a flipped bit.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from fastimagenet.files import written_beside
from pipelines.errors import UserError

LAST, PREVIOUS, EPOCH, BEST = "last.pt", "previous.pt", "epoch.pt", "best.pt"
DIGEST = "sha256"
SEAL_SIZE = 64
"""Bytes of the digest as ASCII."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values. Raises OSError, such as for a full disk."""
    import torch

    try:
        with written_beside(path) as beside, beside.open("w+b") as file:
            torch.save(state, file)
            seal(file)
    except RuntimeError as error:
        # torch's zip writer, closing a file that is already short, hides why it is.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_last(folder: Path, state: dict[str, Any], names: Iterable[str] = ()) -> None:
    """Write `folder`/last.pt and keep the one before as previous.pt; it gets `names`, too.

    At any moment last.pt is whole and previous.pt is another one, so that wherever this is cut
    short, one of the two is intact though the one before has been damaged. Raises OSError, and then
    all are as they were.
    """
    fresh, before = folder / f".{LAST}.new", folder / f".{PREVIOUS}.new"
    try:
        save(fresh, state)
        if (folder / LAST).exists():
            link(folder / LAST, before)
        fresh.replace(folder / LAST)
        if before.exists():
            before.replace(folder / PREVIOUS)
    finally:
        fresh.unlink(missing_ok=True)
        before.unlink(missing_ok=True)
    for name in names:
        beside = folder / f".{name}.new"
        try:
            link(folder / LAST, beside)
            beside.replace(folder / name)
        finally:
            beside.unlink(missing_ok=True)


def link(source: Path, path: Path) -> None:
    """Make `path` another name of the same file, which is never written to again, or a copy."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)


def seal(file: BinaryIO) -> None:
    """Append the digest of a zip archive that has no comment, as its comment."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    digest = digest_of(file, end - 2)
    file.seek(end - 2)  # where the length of the comment is
    file.write(SEAL_SIZE.to_bytes(2, "little") + digest)


def digest_of(file: BinaryIO, size: int) -> bytes:
    """Of the first `size` bytes, as ASCII."""
    digest = hashlib.new(DIGEST)
    while size and (data := file.read(min(size, 1 << 20))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest().encode()


def check_seal(file: BinaryIO) -> None:
    """Raise ValueError unless the file ends with its digest; go to its start."""
    end = file.seek(0, os.SEEK_END)
    body = max(0, end - SEAL_SIZE - 2)
    file.seek(0)
    digest = digest_of(file, body)
    if file.read() != SEAL_SIZE.to_bytes(2, "little") + digest:
        raise ValueError("it is truncated or altered (its checksum does not hold)")
    file.seek(0)


def load(path: Path, *entries: str) -> dict[str, Any]:
    """What `save` wrote, on the CPU; it holds at least `entries`.

    Raises UserError naming the file if it is missing, damaged, hostile or of another program.
    """
    import torch

    try:
        with path.open("rb") as file:
            check_seal(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except pickle.UnpicklingError:  # torch advises to load it all the same
        raise UserError(
            f"checkpoint {path} cannot be read, take another one: it holds more than tensors and "
            "plain values, which fastimagenet.train never writes and which may run code"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read, take another one: {reason}") from None
    missing = [name for name in entries if not isinstance(state, dict) or name not in state]
    if missing:
        raise UserError(
            f"checkpoint {path} was not written by fastimagenet.train: it has no {missing[0]}"
        )
    return dict(state)
