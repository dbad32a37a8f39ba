"""Smaller copies of an image folder, made by `prepare resize`: DIR/160, DIR/352 and so on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.datasets.folders import class_names, list_below, tree_stamps
from pipelines.datasets.index import cached_index
from pipelines.datasets.known import ORIGINAL
from pipelines.datasets.manifest import known_facts
from pipelines.datasets.rule import stem
from pipelines.datasets.split import Split
from pipelines.errors import UserError

MARGIN = 1.25
"""A copy serves an image size if its short side is at least this many times as long; in 2018
fast.ai's students read copies of 160 px for 128."""


def find_copies(root: Path) -> dict[str, int]:
    """Find the finished copies in a data folder: name -> length of the short side, in pixels."""
    found = {}
    for name in class_names(root):
        facts = known_facts(root / name)
        side = facts.get("short_side")
        if facts.get("complete") is True and isinstance(side, int):
            found[name] = side
    return found


def best_copy(copies: Mapping[str, int], image_size: int) -> str:
    """Choose the smallest copy that serves an image size, or ORIGINAL."""
    serving = [(side, name) for name, side in copies.items() if side >= MARGIN * image_size]
    return min(serving)[1] if serving else ORIGINAL


def read_copy(root: Path, name: str, train: Split) -> Split:
    """Read the copies of all training images, in the same order: root/name has the same folders.

    Raises UserError if some have no copy that can be read.
    """
    root = Path(os.path.abspath(root))
    below = "train" if train.in_shards else os.path.relpath(train.folder, root)
    folder = Path(os.path.normpath(root / name / below))
    if not folder.is_dir():
        raise UserError(f"phases.data: {root / name} has no folder {below}/: run prepare resize")
    listing, stamps = partial(list_below, folder), partial(tree_stamps, folder)
    index = cached_index(f"{folder}\0copies", stamps, listing)
    images = index.listing.images
    there = {stem(image): at for at, image in enumerate(images.names_below(str(folder)))}
    bad = {at for at, _ in index.bad}
    indices = np.array([there.get(stem(image), -1) for image in train.names()], np.int64)
    missing = [i for i, at in enumerate(indices.tolist()) if at < 0 or at in bad]
    if missing:
        raise UserError(
            f"phases.data: {root / name} has no readable copy of {len(missing):,} images, the "
            f"first {train.files[missing[0]]}: run prepare resize again, or --set "
            f"phases.INDEX.data={ORIGINAL}"
        )
    return replace(
        train,
        files=images.take(indices),
        shapes=index.shapes[indices],
        orientations=index.orientations[indices],
        sizes=index.sizes[indices],
        folder=str(folder),
    )
