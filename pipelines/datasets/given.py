"""List the images that the user names one by one, or by their folders, without classes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator

from pipelines.datasets.folders import tree
from pipelines.datasets.images import whole_files
from pipelines.datasets.index import CHUNK, check_all
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
    jobs = ((start, files[start : start + CHUNK]) for start in range(0, len(files), CHUNK))
    bad: dict[int, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on large images and damaged metadata
        for _, _, damaged in check_all(jobs, len(files)):
            bad.update(damaged)
    good = [file for index, file in enumerate(files) if index not in bad]
    left_out = tuple((names[index], bad[index]) for index in sorted(bad))
    return Split(good, [0] * len(good), (), left_out)


def files_at(path: str) -> Iterator[str]:
    """Yield the path itself unless it is a folder, else the images in and below it."""
    if not os.path.isdir(path):
        yield path
        return
    for branch in tree(path.rstrip("/") or path):
        yield from (os.path.join(branch.path, name) for name in branch.images)
