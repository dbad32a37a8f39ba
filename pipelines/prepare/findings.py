"""What a scan found: the kinds of findings, the report as JSON and as text."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.files import printable
from pipelines.prepare.duplicates import Duplicates
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
"""Kinds that would stop training, on at least one back end: these go to the skip list."""
NOTES = {
    "wrong-suffix": "the name says another format: read all the same",
    "animated": "only the first of several frames is read",
    "16-bit": "more than 8 bits a sample: scaled to 8",
    "cmyk": "the colour profile is not applied",
    "greyscale": "all channels will be equal",
    "palette": "converted to RGB",
    "alpha": "transparency is dropped",
    "exif-rotated": "EXIF orientation is applied where the recipe is upright",
    "large": "slow, and takes much memory",
    "thin": "little is left of it after a crop",
    "tiny": "less than 8 pixels high or wide",
    "name": "no UTF-8",
}
"""Kinds that every back end reads."""


@dataclass
class Listing:
    """The files of both splits, relative to the data folder."""

    names: list[str] = field(default_factory=list)
    classes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Split -> class -> names of its files."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the folders: training stops at these."""
    notes: list[str] = field(default_factory=list)
    """What is there and not read."""
    training: set[str] = field(default_factory=set)
    """The files of the training split."""

    def add(self, split: str, classes: dict[str, list[str]]) -> None:
        """Add a split: class -> names of its files."""
        self.classes[split] = classes
        names = [name for files in classes.values() for name in files]
        self.names += names
        if split == "train":
            self.training.update(names)

    def split_of(self, name: str) -> str:
        return "train" if name in self.training else "val"


@dataclass(frozen=True)
class Findings:
    """What a scan found; paths are relative to the data folder."""

    listing: Listing
    examined: dict[str, Examined]
    duplicates: list[Duplicates]
    repeated: dict[str, int]
    """Split -> number of images that repeat another one of the split."""

    @property
    def decoded(self) -> bool:
        """Whether all pixels were read, not only headers."""
        return all(file.decoded for file in self.examined.values())

    def by_kind(self) -> dict[str, list[tuple[str, str]]]:
        """Group the files by kind, damage first: kind -> (path, details)."""
        found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in (*DAMAGE, *NOTES)}
        for path, file in self.examined.items():
            for kind, text in file.findings:
                found[kind].append((path, text))
        return {kind: sorted(files) for kind, files in found.items() if files}

    def damaged(self) -> list[tuple[str, str]]:
        """List what the skip list names, sorted: (path, kind)."""
        return sorted(
            (path, kind)
            for path, file in self.examined.items()
            for kind, _ in file.findings
            if kind in DAMAGE
        )

    def classes_left_empty(self) -> list[str]:
        """Name the classes at which training would stop even with the skip list."""
        damaged = {path for path, _ in self.damaged()}
        return [
            f"class {name} has no image in {split} that can be read"
            for split, classes in self.listing.classes.items()
            for name, files in classes.items()
            if files and damaged.issuperset(files)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        by_kind = self.by_kind()
        return {
            "images": len(self.examined),
            "decoded": self.decoded,
            "counts": {kind: len(files) for kind, files in by_kind.items()},
            "problems": self.listing.problems,
            "notes": self.listing.notes,
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


SHOWN = 3
"""Paths that are shown of a kind."""


def describe(findings: Findings, num_read: int, seconds: float, skip_list: Path | None) -> str:
    """Describe the findings as text: damage, notes, duplicates, problems and what to do.

    `num_read` files were read in `seconds`; `skip_list` is the file that was asked for.
    """
    number = len(findings.examined)
    rate = f", {num_read / seconds:,.0f} images/s" if num_read else ""
    what = "all pixels" if findings.decoded else "headers and ends; --decode reads the pixels too"
    lines = [
        f"{number:,} images, {num_read:,} of them read in {seconds:.1f} s{rate} "
        f"({number - num_read:,} unchanged since an earlier scan); {what}"
    ]
    by_kind = findings.by_kind()
    for title, kinds in (("damage, would stop training:", DAMAGE), ("notes:", NOTES)):
        found = {kind: by_kind[kind] for kind in kinds if kind in by_kind}
        if found:
            lines.append(title)
        for kind, files in found.items():
            lines += kind_lines(kind, kinds[kind], files)
    lines += duplicate_lines(findings)
    lines += findings.listing.notes
    if problems := findings.listing.problems:
        lines += ["problems, would stop training:", *(f"  {text}" for text in problems)]
    lines.append(advice(findings, skip_list))
    return printable("\n".join(lines))


def kind_lines(kind: str, meaning: str, files: list[tuple[str, str]]) -> list[str]:
    """Describe a kind in one line, then name some of its files."""
    lines = [f"  {kind:<12} {len(files):>8,}  {meaning}"]
    lines += [f"      {shown(path)} {text}".rstrip() for path, text in files[:SHOWN]]
    return lines + more(len(files))


def duplicate_lines(findings: Findings) -> list[str]:
    lines = []
    if findings.duplicates:
        images = sum(len(val) for _, val in findings.duplicates)
        lines.append(f"duplicates: {images:,} images of validation are in training as well")
        for train, val in findings.duplicates[:SHOWN]:
            lines.append(f"      {shown(val[0])} = {shown(train[0])}")
        lines += more(len(findings.duplicates))
    if findings.repeated:
        parts = [f"{number:,} in {split}" for split, number in findings.repeated.items()]
        lines.append(f"duplicates within a split: {', '.join(parts)}")
    return lines


def more(number: int) -> list[str]:
    return [f"      and {number - SHOWN:,} more"] if number > SHOWN else []


def shown(path: str) -> str:
    """Escape and shorten a path, so that it fits on one line."""
    path = path if path.isprintable() else ascii(path)[1:-1]
    return path if len(path) <= 120 else f"{path[:70]}...{path[-45:]}"


def advice(findings: Findings, skip_list: Path | None) -> str:
    """Say in the last line what to do now."""
    number = len(findings.damaged())
    if not number:
        problems = findings.listing.problems
        return "training stops at the problems above" if problems else "nothing is damaged"
    files = "1 damaged file" if number == 1 else f"{number:,} damaged files"
    if skip_list is not None:
        return f"{files}: leave them out with --skip-list {shlex.quote(str(skip_list))}"
    return f"{files}: --skip-list FILE writes the list that training takes"
