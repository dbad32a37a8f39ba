"""Find files of equal content, within a split and between training and validation."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipelines.datasets.images import open_file
from pipelines.errors import Damage
from pipelines.prepare.examine import ENDS, Examined
from pipelines.workers import in_processes

CHUNK = 64
"""Files that a process hashes at a time."""
Duplicates = tuple[list[str], list[str]]
"""Files of train and of val with equal content."""


def equal_files(root: Path, files: dict[str, Examined], workers: int) -> list[list[str]]:
    """Group the names of files of equal content, each group sorted; damaged files are left out.

    A file is read as a whole only where another one of its size has the same ends; `files` gets the
    digests of those.
    """
    alike: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name, file in files.items():
        if file.ends:
            alike[file.size, file.ends].append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    left = [
        name
        for names in groups
        for name in names
        if files[name].size > 2 * ENDS and not files[name].digest
    ]
    chunks = [left[start : start + CHUNK] for start in range(0, len(left), CHUNK)]
    for done in in_processes(partial(hash_files, root), chunks, workers):
        for name, digest in done:
            files[name] = files[name]._replace(digest=digest)
    equal: dict[tuple[int, str, str], list[str]] = defaultdict(list)
    for names in groups:
        for name in names:
            file = files[name]
            equal[file.size, file.ends, file.digest].append(name)
    return sorted(sorted(names) for names in equal.values() if len(names) > 1)


def hash_files(root: Path, names: list[str]) -> list[tuple[str, str]]:
    """Hash the whole content of each file; "unreadable" stands for one that cannot be read."""
    hashes = []
    for name in names:
        try:
            file, _ = open_file(os.path.join(root, name))
            with open(file, "rb") as stream:
                hashes.append((name, hashlib.file_digest(stream, "sha256").hexdigest()))
        except (Damage, OSError):
            hashes.append((name, "unreadable"))
    return hashes


def between_splits(
    groups: list[list[str]], split_of: Callable[[str], str]
) -> tuple[list[Duplicates], dict[str, int]]:
    """Return the groups that are in both splits, and per split how many images repeat another."""
    both = []
    repeated = Counter({"train": 0, "val": 0})
    for group in groups:
        train = [path for path in group if split_of(path) == "train"]
        val = [path for path in group if split_of(path) == "val"]
        if train and val:
            both.append((train, val))
        repeated.update(train=max(0, len(train) - 1), val=max(0, len(val) - 1))
    return both, +repeated
