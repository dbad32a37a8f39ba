"""A table of images: a CSV file with the columns path and label, and perhaps split."""

from __future__ import annotations

import csv
import io
import os
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.datasets.folders import SPLIT_FOLDERS
from pipelines.datasets.images import Images, Listing
from pipelines.datasets.shards import is_file_name
from pipelines.errors import UserError
from pipelines.files import read_text

COLUMNS = ("path", "label", "split")


class Row(NamedTuple):
    """An image; rows sort by class, folder and name."""

    label: str
    folder: str
    """Absolute."""
    name: str
    split: str
    """As the file has it; empty without that column."""

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.name}"


class Table(NamedTuple):
    """The rows of a file, sorted."""

    rows: list[Row]
    splits: dict[str, str]
    """Split -> what the file calls it; empty without that column."""
    classes: tuple[str, ...]
    """Of all rows, sorted."""

    def of(self, split: str | None) -> list[Row]:
        """Select the rows of a split; None: all rows."""
        return [row for row in self.rows if split is None or row.split == self.splits.get(split)]


def read_table(root: Path, file: Path) -> Table:
    """Read a table whose paths are absolute or relative to `root`, an absolute path.

    Raises UserError that names the file and its line.
    """
    try:
        text = read_text(file)
        lines = csv.reader(io.StringIO(text), strict=True)
        header = [name.strip().lower() for name in next(lines, [])]
        if not {"path", "label"} <= {*header}:
            raise wrong(file, 1, f"must name the columns {', '.join(COLUMNS[:2])}")
        places = [header.index(name) if name in header else None for name in COLUMNS]
        found: dict[str, Row] = {}
        for cells in lines:
            if not any(cells):
                continue
            path, label, split = (
                "" if at is None or at >= len(cells) else cells[at].strip() for at in places
            )
            row = make_row(root, file, lines.line_num, path, label, split)
            if found.setdefault(row.path, row) != row:
                raise wrong(file, lines.line_num, f"has another label or split of {path}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels: cannot read {file}: {error}") from None
    if not found:
        raise UserError(f"--labels {file} names no image")
    rows = sorted(found.values())
    return Table(rows, splits_of(file, rows, places[2]), tuple(sorted({row.label for row in rows})))


def make_row(root: Path, file: Path, line: int, path: str, label: str, split: str) -> Row:
    """Check the cells of a line. A backslash separates folders unless a file has that name."""
    if not path or not is_file_name(label):
        what = f"a label that could name a folder, not {label!r}" if path else "a path"
        raise wrong(file, line, f"must have {what}")
    whole = os.path.normpath(root / path)
    if "\\" in path and not os.path.exists(whole):
        whole = os.path.normpath(root / path.replace("\\", "/"))
    if not whole.startswith(f"{root}/"):
        raise wrong(file, line, f"must name an image in {root}, not {path}")
    return Row(label, *os.path.split(whole), split)


def splits_of(file: Path, rows: list[Row], column: int | None) -> dict[str, str]:
    """Find what the column calls each split: train, and the first name of validation in use."""
    if column is None:
        return {}
    used = {row.split for row in rows}
    known = [name for names in SPLIT_FOLDERS.values() for name in names]
    if strange := sorted(used - {*known}):
        raise UserError(
            f"--labels {file}: the column split must be {', '.join(known)}, not {strange[0]!r}"
        )
    there = {
        split: [name for name in names if name in used] for split, names in SPLIT_FOLDERS.items()
    }
    return {split: names[0] for split, names in there.items() if names}


def wrong(file: Path, line: int, text: str) -> UserError:
    return UserError(f"--labels {file}: line {line} {text}")


def list_rows(table: Table, split: str | None) -> Listing:
    """List the images of a split of the table; None: all."""
    labels = {name: label for label, name in enumerate(table.classes)}
    groups = [
        (key, [row.name for row in rows])
        for key, rows in groupby(table.of(split), lambda row: (row.label, row.folder))
    ]
    images = Images.packed((folder for (_, folder), _ in groups), (names for _, names in groups))
    holders = np.array([labels[label] for (label, _), _ in groups], np.int32)
    return Listing(images, holders[images.holder], table.classes)


def table_stamps(table: Table, file: Path) -> list[int]:
    """Return what changes with the file, and with the images in the folders that it names."""
    stamps = []
    for path in (str(file), *sorted({row.folder for row in table.rows})):
        try:
            status = os.stat(path)
            entries = len(os.listdir(path)) if path != str(file) else status.st_size
            stamps += [status.st_mtime_ns, status.st_ctime_ns, entries]
        except OSError:
            stamps += [0, 0, 0]  # an image there is found to be missing
    return stamps
