"""Image folders: `DIR/train/CLASS/*` and `DIR/val/CLASS/*`."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.datasets.images import Images, Listing
from pipelines.errors import UserError

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "test")}
"""Split -> its folder, the first of these that is there."""


def find_split(root: Path, split: str) -> Path:
    """Find the folder of a split; raises UserError if it or `root` is missing."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: --data takes a folder with train/ and val/")
    names = SPLIT_FOLDERS[split]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{root} has no folder {' or '.join(names)}/: expected {names[0]}/CLASS/IMAGE")


def visible(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a loop of links is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def class_names(folder: Path) -> list[str]:
    """List the visible folders in `folder`, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in visible(folder) if is_folder(entry))


def list_folder(folder: Path) -> Listing:
    """List the files of a split, sorted by class and name; hidden ones are left out.

    Links to folders are followed. Raises UserError where there are no classes.
    """
    classes = class_names(folder)
    if not classes:
        raise UserError(f"{folder} has no class folders: expected {folder}/CLASS/IMAGE")
    files = (
        sorted(entry.name for entry in visible(folder / name) if not is_folder(entry))
        for name in classes
    )
    images = Images.packed((f"{folder}/{name}" for name in classes), files)
    return Listing(images, images.holder, tuple(classes))


def folder_stamps(folder: Path) -> list[int]:
    """Return when the folder and its classes last changed, in ns: files added, removed, renamed."""
    paths = (folder, *(folder / name for name in class_names(folder)))
    return [os.stat(path).st_mtime_ns for path in paths]
