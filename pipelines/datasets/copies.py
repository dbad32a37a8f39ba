"""Smaller copies of an image folder, made by `prepare resize`: DIR/160, DIR/352 and so on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.datasets.folders import class_names
from pipelines.datasets.known import ORIGINAL
from pipelines.datasets.manifest import read_manifest
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError

MARGIN = 1.25
"""A copy serves an image size if its short side is at least this many times as long; in 2018
fast.ai's students read copies of 160 px for 128."""


def find_copies(root: Path) -> dict[str, int]:
    """Find the finished copies in a data folder: name -> length of the short side, in pixels."""
    found = {}
    for name in class_names(root):
        facts = read_manifest(root / name)
        side = facts.get("short_side")
        if facts.get("complete") is True and isinstance(side, int):
            found[name] = side
    return found


def best_copy(copies: Mapping[str, int], image_size: int) -> str:
    """Choose the smallest copy that serves an image size, or ORIGINAL."""
    serving = [(side, name) for name, side in copies.items() if side >= MARGIN * image_size]
    return min(serving)[1] if serving else ORIGINAL


def read_copy(root: Path, name: str, train: Split) -> Split:
    """Read the copies of all training images, in the same order.

    Raises UserError if some have no copy that can be read.
    """
    copy = read_split(root / name, "train", on_bad_image="skip")
    there = {key: index for index, key in enumerate(keys_of(copy))}
    indices = np.array([there.get(key, -1) for key in keys_of(train)], np.int64)
    missing = np.flatnonzero(indices < 0)
    if len(missing):
        raise UserError(
            f"phases.data: {root / name} has no readable copy of {len(missing):,} images, the "
            f"first {train.files[missing[0]]}: run prepare resize again, or --set "
            f"phases.INDEX.data={ORIGINAL}"
        )
    return replace(copy.take(indices), labels=train.labels, classes=train.classes)


def keys_of(split: Split) -> Iterator[str]:
    """Yield what each image has in common with its copies: class, and name without suffix."""
    for file, label in zip(split.files, np.asarray(split.labels).tolist(), strict=True):
        name = (file.name or file.path).rpartition("/")[2]
        yield f"{split.classes[label]}/{name.rpartition('.')[0] or name}"
