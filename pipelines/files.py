"""Files that are written whole or not at all, and JSON objects read back."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.errors import UserError


def cache_folder() -> Path:
    """Where this user keeps what can be made again; perhaps not there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastimagenet"


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` once all of it is on the disk.

    If writing fails the half-written file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Make `text` the whole of the file, or leave the file as it was."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object; NaN and infinity, which JSON does not have, raise ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """`root/.partial`, empty, where `written_in` keeps files until they are whole; then removed.

    For very many files, where `written_beside` would wait for the disk at each of them. What a
    killed process has left there is removed. Raises UserError while another one works on `root`.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / ".partial"
    lock = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {root}: wait for its end") from None
        except OSError:
            pass  # NFS cannot lock folders
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def written_in(scratch: Path, path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path`, in one step, when the block ends without an error.

    A process writes one at a time. The bytes may reach the disk later: a power cut, unlike a
    killed process, can leave an empty file. OSError names `path`.
    """
    beside = scratch / str(os.getpid())
    try:
        with beside.open("wb") as file:
            yield file
        try:
            beside.replace(path)
        except FileNotFoundError:  # the first of its folder
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.replace(path)
    except OSError as error:
        if error.filename in (None, str(beside)):
            error.filename = str(path)
        raise


Row = dict[str, Any]
"""A JSON object: a row of metrics.jsonl, or all of summary.json or plan.json."""


def read_object(path: Path) -> Row:
    """The JSON object in `path`; UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the --output folder of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value
