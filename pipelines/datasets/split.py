"""Read one split of the data, folders or shards: images, labels and classes."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.folders import find_split, folder_stamps, list_folder
from pipelines.datasets.images import ImageFile, Images, Listing
from pipelines.datasets.index import Index, cached_index
from pipelines.datasets.shards import has_shards, list_shards, shard_stamps
from pipelines.errors import Damage, UserError

ON_BAD_IMAGE = ("error", "skip")
SCAN = "python -m pipelines.prepare scan"
Bad = tuple[str, str]
"""An image as errors name it, and what is wrong with it in words that continue the sentence."""


@dataclass(frozen=True, eq=False)
class Split:
    """The images of a split: of folders sorted by class and name, of shards in their order."""

    files: Sequence[ImageFile]
    labels: Sequence[int] | NDArray[np.int32]
    """Per image, the index of its class in `classes`."""
    classes: tuple[str, ...]
    left_out: tuple[Bad, ...] = ()
    """What `on_bad_image="skip"` has left out."""
    shapes: NDArray[np.int32] | None = None
    """(N, 2): height and width as the headers have them; None: not looked at."""
    strange_skip_list: bool = False
    """Whether a skip list was given that names none of the images."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def in_shards(self) -> bool:
        """Whether the images are parts of larger files."""
        return bool(self.files) and self.files[0].size is not None

    def take(self, indices: NDArray[np.int64]) -> Split:
        """Select the images at these indices, in this order."""
        files = self.files
        return replace(
            self,
            files=files.take(indices) if isinstance(files, Images) else [files[i] for i in indices],
            labels=np.asarray(self.labels)[indices],
            shapes=None if self.shapes is None else self.shapes[indices],
        )


def read_split(
    root: Path | str,
    split: str,
    skip_list: Path | str | None = None,
    check_files: bool = True,
    on_bad_image: str = "error",
) -> Split:
    """List the images of `root/split/CLASS/`, or of the shards in `root`.

    `split` is "train" or "val"; "test" is taken where "val" is missing. Hidden files are left out,
    links to folders are followed. `skip_list` names files to leave out, see `read_skip_list`.
    `check_files` looks at the header and the end of each image, and keeps what it finds in the
    user's cache for as long as folders or shards do not change; `on_bad_image` says what becomes of
    those that would stop a back end: "error" raises, "skip" leaves them out and names them in
    `left_out`.

    Raises UserError for a missing folder, no classes, an empty class or a bad file.
    """
    assert on_bad_image in ON_BAD_IMAGE, on_bad_image
    root = Path(os.path.abspath(root))
    skipped = read_skip_list(root, skip_list) if skip_list is not None else frozenset()
    if has_shards(root):
        source = root / split
        stamps, make_listing = partial(shard_stamps, root, split), partial(list_shards, root, split)
    else:
        source = find_split(root, split)
        stamps, make_listing = partial(folder_stamps, source), partial(list_folder, source)
    index = cached_index(source, stamps, make_listing) if check_files else None
    listing = make_listing() if index is None else index.listing
    return chosen(listing, index, source, skipped, on_bad_image)


def chosen(
    listing: Listing,
    index: Index | None,
    source: Path,
    skipped: frozenset[str],
    on_bad_image: str,
) -> Split:
    """Select the images of a split that are neither skipped nor known to be bad."""
    images = listing.images
    shapes, bad_indices = (None, []) if index is None else (index.shapes, index.bad)
    keep = np.ones(len(images), bool)
    found = skipped_indices(images, skipped)
    keep[found] = False
    bad = [(str(images[i]), text) for i, text in bad_indices if keep[i]]
    if bad and on_bad_image == "error":
        raise bad_images(source.parent, bad)
    there = np.bincount(listing.labels[keep], minlength=len(listing.classes))
    keep[[i for i, _ in bad_indices]] = False
    good = np.bincount(listing.labels[keep], minlength=len(listing.classes))
    for name, any_left, any_good in zip(listing.classes, there, good, strict=True):
        if not any_good:
            what = "images that can be read" if any_left else "images"
            raise UserError(f"class {name} has no {what} in {source}: add some or remove it")
    strange = bool(skipped) and not found
    split = Split(images, listing.labels, listing.classes, tuple(bad), shapes, strange)
    return split.take(np.flatnonzero(keep))


def skipped_indices(images: Images, skipped: frozenset[str]) -> list[int]:
    """Find the indices of the skipped files."""
    folders = {os.path.dirname(path) for path in skipped}
    shards = {path.rpartition(":")[0] for path in skipped}
    found = []
    for holder, path in enumerate(images.holders):
        if path in folders or path in shards:
            members = np.flatnonzero(images.holder == holder).tolist()
            found += [i for i in members if str(images[i]) in skipped]
    return found


def bad_images(root: Path, bad: list[Bad]) -> UserError:
    """Make the error that names the first bad file and says what to type."""
    path, reason = bad[0]
    others = f", and {len(bad) - 1:,} more files are bad" if len(bad) > 1 else ""
    advice = "--on-bad-image skip leaves such files out, or name them in --skip-list FILE"
    if not has_shards(root):
        advice += f", which {SCAN} {shlex.quote(str(root))} --skip-list FILE writes"
    return UserError(f"{path} {reason}{others}: {advice}")


def left_out_note(split: Split) -> str:
    """Say in one line what `on_bad_image="skip"` has left out; empty if nothing."""
    if not split.left_out:
        return ""
    path, reason = split.left_out[0]
    number = len(split.left_out)
    files = "1 bad file" if number == 1 else f"{number:,} bad files"
    return f"left out {files} of {number + len(split):,}; the first: {path} {reason}"


def skip_list_note(skip_list: Path | str | None, *splits: Split) -> str:
    """Say in one line that a skip list names no image of these splits; otherwise empty."""
    if not all(split.strange_skip_list for split in splits):
        return ""
    rule = "its paths are absolute or relative to the data folder"
    return f"note: --skip-list {skip_list} names none of the images that are read; {rule}"


def check_classes(train: Split, val: Split) -> None:
    """Raise UserError, naming the first few that differ, unless both have the same classes."""
    if train.classes == val.classes:
        return
    parts = []
    for text, names in (
        ("only in training", sorted(set(train.classes) - set(val.classes))),
        ("only in validation", sorted(set(val.classes) - set(train.classes))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{text}: {', '.join(names[:3])}{more}")
    raise UserError(
        f"the class folders of training and validation differ ({'; '.join(parts)}): "
        "both need the same ones"
    )


class BadImage(UserError):
    """A file that looks like an image but cannot be decoded."""

    def __init__(self, file: ImageFile, reason: str) -> None:
        super().__init__(file, reason)
        self.file = file
        self.reason = reason
        """What is wrong, in words that continue a sentence that begins with the file's name."""

    def __str__(self) -> str:
        return (
            f"{self.file} {self.reason}: remove it or name it in --skip-list; "
            f"{SCAN} DIR --decode finds all such files"
        )


def undecodable(file: ImageFile, reason: Exception) -> BadImage:
    """Make the error for a file that looks like an image but cannot be decoded."""
    text = " ".join(str(reason).split())
    return BadImage(file, text if isinstance(reason, Damage) else f"cannot be decoded ({text})")


def read_skip_list(root: Path, skip_list: Path | str) -> frozenset[str]:
    """Read the paths of files to leave out, one a line, absolute or relative to `root`.

    `#` begins a comment. A path that holds a `#`, a line break or the like is a JSON string.
    """
    try:
        lines = Path(skip_list).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--skip-list: cannot read {skip_list}: {error}") from error
    names = []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line.startswith('"'):
            names.append(line.partition("#")[0].strip())
            continue
        try:
            names.append(json.JSONDecoder().raw_decode(line)[0])
        except ValueError as error:
            raise UserError(
                f"--skip-list: line {number} of {skip_list} is no JSON string: {error}"
            ) from error
    return frozenset(os.path.normpath(root / name) for name in names if name)


def skip_line(name: str) -> str:
    """Write a path as a line that `read_skip_list` takes."""
    plain = (
        name.isprintable() and name.strip() == name and not name.startswith('"') and "#" not in name
    )
    return name if plain else json.dumps(name)
