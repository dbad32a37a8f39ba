"""List the images that the user names one by one, or by their folders, without classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np

from pipelines.datasets.folders import METADATA_FOLDERS, is_folder, visible
from pipelines.datasets.images import whole_files
from pipelines.datasets.index import check_all
from pipelines.datasets.split import Split
from pipelines.errors import UserError


def given_images(paths: Iterable[str]) -> Split:
    """List files, and all files below folders, as a split without classes whose labels are zeros.

    The order is that of the paths, in a folder its files by name and then its folders. Hidden files
    and metadata folders are left out, links to folders are followed. Header and end of each file
    are looked at: what cannot be an image is left out, and named in `left_out`. Raises UserError
    where there is no file at all.
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


def files_at(path: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Yield the path itself unless it is a folder, else the files in and below it.

    `above`: the folders that hold it, which a link may lead back to.
    """
    try:
        entries = sorted(visible(path), key=lambda entry: entry.name)
        status = os.stat(path)
    except OSError:  # no folder, or none that can be read: the check of the files says so
        yield path
        return
    folder = status.st_dev, status.st_ino
    if folder in above:
        return
    yield from (entry.path for entry in entries if not is_folder(entry))
    for entry in filter(is_folder, entries):
        if entry.name in METADATA_FOLDERS:
            continue
        yield from files_at(entry.path, above | {folder})
