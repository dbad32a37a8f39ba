"""The images of a run: read and checked, what is told of them, and the copies that phases read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastimagenet.config import DataConfig
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Recipe
from pipelines.backends import start_workers
from pipelines.datasets.copies import best_copy, find_copies, read_copy
from pipelines.datasets.known import AUTO, ORIGINAL
from pipelines.datasets.split import Split, check_classes, check_several, notes_of
from pipelines.errors import UserError

UNBALANCED = 10
"""The largest class has so many times the images of the smallest, or more."""


def read_data(
    data: DataConfig, say_notes: bool, notes: Sequence[str] = (), recipe: Recipe | None = None
) -> tuple[Split, Split]:
    """Read both splits and check their files. Raises UserError naming the folder or file.

    `say_notes`: print on standard error what was left out, and what a `recipe` should see to,
    behind the other `notes`.
    """
    start_workers(data.backend)
    train, val = data.read("train"), data.read("val")
    check_classes(train, val)
    check_several(train)
    for note in (*notes, *data_notes(train, val, recipe)) if say_notes else ():
        print(note, file=sys.stderr)  # noqa: T201
    return train, val


def data_notes(train: Split, val: Split, recipe: Recipe | None) -> list[str]:
    """Say what of the data is not read, and what a recipe should see to: how unbalanced the classes
    are, and images that lie on their side."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    most, least = int(counts.argmax()), int(counts.argmin())
    notes = notes_of(train, val)
    if counts[most] >= UNBALANCED * counts[least]:
        notes.append(
            f"note: the classes are unbalanced: {counts[most]:,} training images of "
            f"{train.classes[most]}, {counts[least]:,} of {train.classes[least]}; --set "
            "class_weight_power=0.5, or up to 1, weighs rare ones more"
        )
    turned = train.num_turned + val.num_turned
    if turned and recipe is not None and not recipe.upright:
        notes.append(
            f"note: {turned:,} of {len(train) + len(val):,} images have an EXIF orientation, which "
            "is not applied: --set upright=true turns them upright"
        )
    return notes


def with_copies(recipe: Recipe, root: Path) -> Recipe:
    """Choose the copies in the data folder that the phases train on.

    Raises UserError where a phase names one that is not there, or not finished.
    """
    copies = find_copies(root)
    phases = []
    for index, phase in enumerate(recipe.phases):
        data = best_copy(copies, phase.image_size) if phase.data == AUTO else phase.data
        if data not in (*copies, ORIGINAL):
            there = f"has {', '.join(copies)}" if copies else "has no finished copies"
            remedy = f'name a copy, "{ORIGINAL}" or "{AUTO}"'
            if data.isdecimal():
                resize = f"python -m pipelines.prepare resize {root} {root}"
                remedy = f"{resize} --short-side {data} makes one"
            raise UserError(
                f"recipe field phases.{index}.data = {data!r}: {root} {there}; {remedy}"
            )
        phases.append(replace(phase, data=data))
    return replace(recipe, phases=tuple(phases))


def digest_of(*splits: Split) -> str:
    """Tell the images of a run from all others by their names, labels and sizes in bytes."""
    return "".join(split.digest()[:32] for split in splits)


def read_copies(root: Path, plan: Plan, train: Split) -> dict[str, Split]:
    """Read the copies that phases train on, by name. Raises UserError where some are missing."""
    names = {phase.copy: 0 for phase in plan.phases if phase.copy}
    return {name: read_copy(root, name, train) for name in names}
