"""List the images that the user names one by one, or by their folders, without classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np

from pipelines.datasets.folders import tree
from pipelines.datasets.images import whole_files
from pipelines.datasets.index import check_all
from pipelines.datasets.split import Split
from pipelines.errors import UserError


def given_images(paths: Iterable[str]) -> Split:
    """List files, and all files below folders, as a split without classes whose labels are zeros.

    The order is that of the paths, and in a folder that of `folders.tree`, which passes over hidden
    files and metadata. Header and end of each file are looked at: what cannot be an image is left
    out, and named in `left_out`. Raises UserError where there is no file at all.
    """
    paths = list(paths)
    names = [name for path in paths for name in files_at(path)]
    if not names:
        what = f"there is no file in {', '.join(paths)}" if paths else "no image was named"
        raise UserError(f"{what}: name images, or folders that hold some")
    files = whole_files(names)
    facts, bad = check_all(files)
    left_out = tuple((names[index], text) for index, text in bad)
    good = np.delete(np.arange(len(files)), [index for index, _ in bad])
    return Split(
        files,
        [0] * len(files),
        (),
        left_out,
        shapes=facts[:, :2].astype(np.int32),
        orientations=facts[:, 2].astype(np.int8),
    ).take(good)


def files_at(path: str) -> Iterator[str]:
    """Yield the path itself unless it is a folder, else the images in and below it."""
    if not os.path.isdir(path):
        yield path
        return
    for branch in tree(path.rstrip("/") or path):
        yield from (os.path.join(branch.path, name) for name in branch.images)
