"""Write files whole or not at all, and read JSON objects back."""

from __future__ import annotations

import codecs
import csv
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.errors import UserError


def cache_folder() -> Path:
    """Name the user's cache folder, which may not exist yet. UserError where the user has none."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastimagenet"
    except RuntimeError:  # neither HOME nor an entry of the user
        raise UserError(
            "this user has no home folder for the cache: set XDG_CACHE_HOME to a folder that can "
            "be written to"
        ) from None


@contextmanager
def writing_to_cache() -> Iterator[None]:
    """Turn the errors of the disk in the block into one that says where else a cache can be."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or cache_folder()}: {error.strerror}"
        raise UserError(
            f"the cache cannot be written to ({reason}): set XDG_CACHE_HOME to another folder"
        ) from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write to a temporary file and rename it to `path` after fsync.

    If writing fails, the temporary file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """Read a text that a user wrote: UTF-8, or UTF-16 with its mark, with the line ends of any
    system. Raises OSError, and UnicodeDecodeError for what is neither."""
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if wide else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def printable(text: str) -> str:
    """Escape the bytes of a path that are not UTF-8, which Python keeps as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text`, or leave it as it was; what is not UTF-8 in it is escaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")


def write_table(path: Path, header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file with a header, as `write_text` does; cells are text or numbers."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object; NaN and infinity, which JSON lacks, raise ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """Make `root/.partial`, empty, for the temporary files of `atomic_write_in`; then remove it.

    For very many files, where `atomic_write` would wait for the disk at each of them. Leftovers of
    a killed process are removed. Raises UserError while another process works on `root`.
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
def atomic_write_in(scratch: Path, path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary file in `scratch` and rename it to `path`, without fsync.

    A process writes one at a time. A power cut, unlike a killed process, can leave an empty file.
    OSError names `path`.
    """
    temporary = scratch / str(os.getpid())
    try:
        with temporary.open("wb") as file:
            yield file
        try:
            temporary.replace(path)
        except FileNotFoundError:  # the first of its folder
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


Row = dict[str, Any]
"""A JSON object: a row of metrics.jsonl, or all of summary.json or plan.json."""


def read_object(path: Path) -> Row:
    """Read the JSON object in `path`; UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the --output folder of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value
