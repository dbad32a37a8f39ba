"""What earlier scans have seen, in the user's cache: a file that has not changed is not read."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import PIL

from pipelines.files import cache_folder, write_text
from pipelines.prepare.examine import Examined
from pipelines.prepare.findings import DAMAGE, NOTES

VERSION = 1
FORMAT = [VERSION, PIL.__version__]
"""Another Pillow may judge otherwise."""
TYPES = [int, int, bool, str, str]
"""Of a row without its findings."""


class ScanCache:
    """Results by path below one data folder; valid for the size and time that the file had."""

    def __init__(self, root: Path) -> None:
        """Load what there is; a damaged cache is left aside with a note on standard error."""
        name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:20]
        self.path = cache_folder() / "scan" / f"{name}.json"
        self.files: dict[str, Examined] = {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["format"] == FORMAT:
                self.files = {path: examined(row) for path, row in stored["files"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            note(f"the scan cache {self.path} cannot be read and is made anew ({error!r})")
            self.files = {}

    def find(self, path: str, root: Path, decode: bool) -> Examined | None:
        """The result for a file that is as it was; one of the header only is none for `decode`."""
        found = self.files.get(path)
        if found is None or (decode and not found.decoded):
            return None
        try:
            status = os.stat(root / path)
        except OSError:
            return None
        same = (status.st_size, status.st_mtime_ns) == (found.size, found.mtime_ns)
        return found if same else None

    def save(self, files: dict[str, Examined]) -> None:
        """Keep these results in place of all older ones; a cache that cannot be written is noted.

        What could not be read is not kept: permissions change without a trace in size and time.
        """
        kept = {
            path: file
            for path, file in files.items()
            if file.size >= 0 and not any(kind == "unreadable" for kind, _ in file.findings)
        }
        value = {"format": FORMAT, "files": kept}
        try:
            write_text(self.path, json.dumps(value, separators=(",", ":")))
        except OSError as error:
            note(f"the scan cache {self.path} cannot be written ({error.strerror})")


def examined(row: list[Any]) -> Examined:
    """One stored row; raises ValueError or TypeError where it is damaged."""
    size, mtime_ns, decoded, ends, findings, digest = row
    if [type(value) for value in (size, mtime_ns, decoded, ends, digest)] != TYPES:
        raise ValueError(f"not a row: {row!r:.80}")
    known = tuple((kind, text) for kind, text in findings if kind in DAMAGE or kind in NOTES)
    if len(known) != len(findings):
        raise ValueError(f"unknown findings: {findings!r:.80}")
    return Examined(size, mtime_ns, decoded, ends, known, digest)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)  # noqa: T201
