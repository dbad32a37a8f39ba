"""Smaller copies of an image folder, made by `prepare resize`: DIR/160, DIR/352 and so on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.datasets.folders import class_names
from pipelines.datasets.images import ImageFile
from pipelines.datasets.known import ORIGINAL
from pipelines.datasets.manifest import NAME, read_manifest
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError

MARGIN = 1.25
"""A copy serves an image size if its short side is at least this many times as long; in 2018
fast.ai's students read copies of 160 px for 128."""


def find_copies(root: Path) -> dict[str, int]:
    """Find the finished copies in a data folder: name -> length of the short side, in pixels."""
    found = {}
    for name in class_names(root) if root.is_dir() else ():
        if (root / name / NAME).is_file():
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
    stems = [stems_of(copy, label) for label in range(len(copy.classes))]
    labels = {title: label for label, title in enumerate(copy.classes)}
    indices = np.full(len(train), -1)
    for index, label in enumerate(np.asarray(train.labels).tolist()):
        there = labels.get(train.classes[label])
        if there is not None:
            indices[index] = stems[there].get(stem(train.files[index]), -1)
    missing = np.flatnonzero(indices < 0)
    if len(missing):
        raise UserError(
            f"phases.data: {root / name} has no readable copy of {len(missing):,} images, the "
            f"first {train.files[missing[0]]}: run prepare resize again, or --set "
            f"phases.INDEX.data={ORIGINAL}"
        )
    return replace(copy.take(indices), labels=train.labels, classes=train.classes)


def stems_of(split: Split, label: int) -> dict[str, int]:
    """Map the images of a class: name without its suffix -> index in the split."""
    indices = np.flatnonzero(np.asarray(split.labels) == label).tolist()
    return {stem(split.files[index]): index for index in indices}


def stem(file: ImageFile) -> str:
    """Return the part of the name that an image and its copies have in common."""
    name = (file.name or file.path).rpartition("/")[2]
    return name.rpartition(".")[0] or name
