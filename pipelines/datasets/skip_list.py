"""The skip list: a text file with the paths of images to leave out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.datasets.images import Images
from pipelines.errors import UserError
from pipelines.files import read_text


class Entry(NamedTuple):
    """A line of the list."""

    text: str
    """As it stands there."""
    path: str
    """Absolute."""
    turned: str
    """The same path where backslashes separate folders, as on Windows."""


class Skipped(NamedTuple):
    """What a list has to do with the images of a split."""

    file: str
    """The list."""
    number: int
    """Of its names."""
    unmatched: tuple[str, ...]
    """Those that name no image, nor anything in another split."""


@dataclass(frozen=True)
class SkipList:
    """The names of a list."""

    file: str
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, root: Path, file: Path | str) -> SkipList:
        """Read the paths of files to leave out, one a line, absolute or relative to `root`.

        `#` begins a comment. A path that holds a `#`, a line break or the like is a JSON string.
        Raises UserError for what cannot be read.
        """
        try:
            lines = read_text(Path(file)).split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--skip-list: cannot read {file}: {error}") from error
        texts = (text_of(line.strip(), number, file) for number, line in enumerate(lines, start=1))

        def path(text: str) -> str:
            return os.path.normpath(root / text)

        return cls(
            str(file),
            tuple(
                Entry(text, path(text), path(text.replace("\\", "/")))
                for text in dict.fromkeys(filter(None, texts))
            ),
        )

    def find(self, images: Images, elsewhere: Callable[[str], bool]) -> tuple[list[int], Skipped]:
        """Find the indices of the images that are named.

        `elsewhere` tells whether a path is of another split. A backslash is part of a name if a
        file has that name.
        """
        paths = {entry.path for entry in self.entries}
        found = indices_of(images, paths)
        left = [entry for entry in self.entries if entry.path not in found]
        turned = indices_of(images, {entry.turned for entry in left if "\\" in entry.text})
        unmatched = tuple(
            entry.text
            for entry in left
            if entry.turned not in turned and not elsewhere(entry.turned)
        )
        indices = [*found.values(), *turned.values()]
        return indices, Skipped(self.file, len(self.entries), unmatched)


def text_of(line: str, number: int, file: Path | str) -> str:
    """Read a line of the list; empty for one without a path."""
    if not line.startswith('"'):
        return line.partition("#")[0].strip()
    try:
        return str(json.JSONDecoder().raw_decode(line)[0])
    except ValueError as error:
        raise UserError(
            f"--skip-list: line {number} of {file} is no JSON string: {error}"
        ) from error


def indices_of(images: Images, paths: set[str]) -> dict[str, int]:
    """Find the indices of the images that have these paths, or shard and member."""
    folders = {os.path.dirname(path) for path in paths}
    shards = {path.rpartition(":")[0] for path in paths}
    found = {}
    for holder, path in enumerate(images.holders):
        if path in folders or path in shards:
            for index in np.flatnonzero(images.holder == holder).tolist():
                if (name := str(images[index])) in paths:
                    found[name] = index
    return found


def skip_line(name: str) -> str:
    """Write a path as a line of a skip list."""
    plain = (
        name.isprintable() and name.strip() == name and not name.startswith('"') and "#" not in name
    )
    return name if plain else json.dumps(name)


def unmatched_note(skipped: list[Skipped]) -> str:
    """Say in one line which names of a list match nothing in all splits; otherwise empty."""
    unmatched = list(dict.fromkeys(text for each in skipped for text in each.unmatched))
    if not unmatched:
        return ""
    file, number, _ = skipped[0]
    rule = "its paths are absolute or relative to the data folder"
    if len(unmatched) == number:
        return f"note: --skip-list {file} names none of the images that are read; {rule}"
    names = "1 name matches" if len(unmatched) == 1 else f"{len(unmatched):,} names match"
    first = skip_line(unmatched[0])
    return f"note: --skip-list {file}: {names} no image, the first: {first}; {rule}"
