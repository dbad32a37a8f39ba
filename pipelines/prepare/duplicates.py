"""Images that are there twice: those of val that training has seen spoil its accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipelines.prepare.examine import ENDS, Examined, hash_files
from pipelines.prepare.findings import Duplicates
from pipelines.workers import in_processes

CHUNK = 64


def equal_files(root: Path, files: dict[str, Examined], workers: int) -> list[list[str]]:
    """Groups of names of files with the same content, each sorted; damaged ones are left out.

    Whole files are only read where others of the same size have the same ends; then `files` gets
    their digests.
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


def between_splits(
    groups: list[list[str]], split_of: Callable[[str], str]
) -> tuple[list[Duplicates], dict[str, int]]:
    """The groups that are in both splits, and per split how many images another one equals."""
    both = []
    repeated: dict[str, int] = defaultdict(int)
    for group in groups:
        parts: dict[str, list[str]] = {"train": [], "val": []}
        for path in group:
            parts[split_of(path)].append(path)
        if all(parts.values()):
            both.append((parts["train"], parts["val"]))
        for split, paths in parts.items():
            repeated[split] += max(0, len(paths) - 1)
    return both, {split: number for split, number in repeated.items() if number}
