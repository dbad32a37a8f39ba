"""Where the images of a split are listed: class folders, a table of labels, or shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.folders import (
    SPLIT_FOLDERS,
    check_root,
    find_split,
    folder_stamps,
    list_folder,
)
from pipelines.datasets.images import Listing
from pipelines.datasets.labels import list_rows, read_table, table_stamps
from pipelines.datasets.rule import SplitRule, validating
from pipelines.datasets.shards import has_shards, list_shards, shard_stamps
from pipelines.errors import UserError


def never(path: str) -> bool:
    return False


def begins(start: str, path: str) -> bool:
    return path.startswith(start)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split of a data folder."""

    folder: Path
    """That which holds the classes, or the shards, or the paths of a table."""
    place: Path
    """What errors call it."""
    key: str
    """What the index is named after."""
    stamps: Callable[[], list[int]]
    """What changes with the images that are listed."""
    listing: Callable[[], Listing]
    elsewhere: Callable[[str], bool] = never
    """Whether a path is of another split, which is listed by itself."""
    training: bool
    name: str
    """Of the split, such as "test"."""
    val_fraction: float | None = None
    """Share of the listed images that validate; None: all are of this split."""
    notes: tuple[str, ...] = ()

    def select(self, listing: Listing) -> tuple[NDArray[np.bool_], str]:
        """Find the images of the split, (N,) bool, and a note on how. Raises UserError."""
        if self.val_fraction is None:
            return np.ones(len(listing.images), bool), ""
        chosen, note = validating(listing, str(self.folder), self.val_fraction)
        return ~chosen if self.training else chosen, note


def find_source(root: Path, split: str, rule: SplitRule) -> Source:
    """Find the images of a split. Raises UserError where the data folder has none."""
    training = split == "train"
    other = "val" if training else "train"
    if has_shards(root):
        if rule.given:
            raise UserError(f"{rule.flags().split()[0]}: {root} holds shards, with splits already")
        return Source(
            folder=root,
            place=root / split,
            key=str(root / split),
            stamps=partial(shard_stamps, root, split),
            listing=partial(list_shards, root, split),
            elsewhere=partial(begins, f"{root / other}-"),
            training=training,
            name=split,
        )
    if rule.labels is not None:
        return table_source(root, split, rule, rule.labels)
    if rule.val_fraction is None:
        folder = find_split(root, split)
        others = [f"{root / name}/" for name in SPLIT_FOLDERS[other] if (root / name).is_dir()]
        name, elsewhere = folder.name, partial(begins, others[0]) if others else never
    else:
        folder, name, elsewhere = undivided(root), split, never
    return Source(
        folder=folder,
        place=folder,
        key=str(folder),
        stamps=partial(folder_stamps, folder),
        listing=partial(list_folder, folder),
        elsewhere=elsewhere,
        training=training,
        name=name,
        val_fraction=rule.val_fraction,
    )


def check_no_shards(root: Path, command: str) -> None:
    """Raise UserError for shards, where a command takes the image files themselves."""
    if has_shards(root):
        raise UserError(
            f"{root} holds shards, which {command} does not read: name the image folder that they "
            "were made of"
        )


def undivided(root: Path) -> Path:
    """Find the folder of the classes that --val-fraction divides: train/, or the data folder.

    Raises UserError where there are images for validation already.
    """
    check_root(root)
    if not (root / "train").is_dir():
        return root
    for name in SPLIT_FOLDERS["val"]:
        if (root / name).is_dir():
            raise UserError(
                f"--val-fraction: {root} has a folder {name}/ already: leave the flag out, or name "
                f"{root / 'train'} as the data folder"
            )
    return root / "train"


def table_source(root: Path, split: str, rule: SplitRule, file: Path) -> Source:
    """Find the images of a split in a table of labels."""
    check_root(root)
    table = read_table(root, file)
    if table.splits and rule.val_fraction is not None:
        raise UserError(f"--val-fraction: --labels {file} has a column split: leave the flag out")
    if not table.splits and rule.val_fraction is None:
        raise UserError(
            f"--labels {file} has no column split: --val-fraction 0.2 takes a share for validation"
        )
    if table.splits and split not in table.splits:
        raise UserError(f"--labels {file}: the column split has no row of {split}")
    column = split if table.splits else None
    unread = [row for row in table.rows if table.splits and row.split not in table.splits.values()]
    notes: tuple[str, ...] = ()
    if unread:
        names = ", ".join(sorted({row.split for row in unread}))
        rows = "1 row" if len(unread) == 1 else f"{len(unread):,} rows"
        notes = (f"left out {rows} of --labels {file} of split {names}",)
    others = {row.path for row in table.rows} - {row.path for row in table.of(column)}
    return Source(
        folder=root,
        place=file,
        key=f"{root}\0{os.path.abspath(file)}\0{column}",
        stamps=partial(table_stamps, table, file),
        listing=partial(list_rows, table, column),
        elsewhere=others.__contains__,
        training=split == "train",
        name=table.splits.get(split, split),
        val_fraction=rule.val_fraction,
        notes=notes,
    )
