"""The kinds of findings, and what a scan found as a whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipelines.prepare.examine import Examined

DAMAGE = {
    "empty": "no bytes",
    "truncated": "the end is missing",
    "junk": "no image at all",
    "format": "an image that not every back end reads: convert it",
    "corrupt": "cannot be decoded",
    "too-large": "more pixels than Pillow decodes",
    "too-thin": "no memory would hold it once its short side is enlarged",
    "unreadable": "no permission, or a link that leads nowhere",
    "not-a-file": "a FIFO, socket or device",
}
"""Kinds that would stop training, on one back end at least: these go to the skip list."""
NOTES = {
    "wrong-suffix": "the name says another format: read all the same",
    "animated": "only the first of several frames is read",
    "16-bit": "more than 8 bits a sample: greyscale ones look different to each back end",
    "cmyk": "the colour profile is not applied",
    "greyscale": "all channels will be equal",
    "palette": "converted to RGB",
    "alpha": "transparency is dropped",
    "exif-rotated": "EXIF orientation is not applied",
    "large": "slow, and takes much memory",
    "thin": "little is left of it after a crop",
    "tiny": "less than 8 pixels high or wide",
    "name": "no UTF-8",
    "folder": "a folder in a class folder: what it holds is not read",
}
"""Kinds that every back end reads."""
Duplicates = tuple[list[str], list[str]]
"""Files of train and of val with equal content."""


@dataclass
class Findings:
    """What a scan found; paths are relative to the data folder."""

    examined: dict[str, Examined]
    decoded: bool
    problems: list[str] = field(default_factory=list)
    """What is wrong with the folders: training stops at these."""
    folders: list[str] = field(default_factory=list)
    """Folders in class folders."""
    duplicates: list[Duplicates] = field(default_factory=list)
    repeated: dict[str, int] = field(default_factory=dict)
    """Per split, images that are there more than once, not counting the first."""

    def by_kind(self) -> dict[str, list[tuple[str, str]]]:
        """Kind -> (path, detail) of all files of that kind, damage first."""
        found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in (*DAMAGE, *NOTES)}
        for path, file in self.examined.items():
            for kind, text in file.findings:
                found[kind].append((path, text))
        found["folder"] += [(path, "is a folder") for path in self.folders]
        return {kind: sorted(files) for kind, files in found.items() if files}

    def damaged(self) -> list[tuple[str, str]]:
        """(path, kind) of what the skip list names, sorted."""
        return sorted(
            (path, kind)
            for path, file in self.examined.items()
            for kind, _ in file.findings
            if kind in DAMAGE
        )

    def to_dict(self) -> dict[str, Any]:
        """The report, for JSON."""
        by_kind = self.by_kind()
        counts = Counter({kind: len(files) for kind, files in by_kind.items()})
        return {
            "images": len(self.examined),
            "decoded": self.decoded,
            "counts": dict(counts),
            "problems": self.problems,
            "findings": [
                {
                    "path": path,
                    "kind": kind,
                    "severity": "damage" if kind in DAMAGE else "note",
                    "detail": text,
                }
                for kind, files in by_kind.items()
                for path, text in files
            ],
            "duplicates_between_splits": [
                {"train": train, "val": val} for train, val in self.duplicates
            ],
            "duplicates_within_splits": self.repeated,
        }
