"""Read one split of the data, folders or shards: images, labels and classes."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.datasets.images import ImageFile, Images, Listing, PassedOver
from pipelines.datasets.index import SCAN, Index, cached_index, index_folder
from pipelines.datasets.pixels import orientation_of, stored_size, swapped
from pipelines.datasets.rule import SplitRule
from pipelines.datasets.shards import has_shards
from pipelines.datasets.skip_list import SkipList, Skipped, unmatched_note
from pipelines.datasets.source import Source, find_source
from pipelines.errors import Damage, UserError, nearest
from pipelines.limits import system_limit

BY_FOLDERS = SplitRule()
ON_BAD_IMAGE = ("error", "skip")
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
    orientations: NDArray[np.int8] | None = None
    """(N,): EXIF orientation, 1 to 8; None: not looked at."""
    sizes: NDArray[np.int64] | None = None
    """(N,): bytes of the encoded images; None: not looked at."""
    folder: str = "."
    """That which holds the classes, or the shards."""
    name: str = "val"
    """Of the split's own folder, such as "test"."""
    notes: tuple[str, ...] = ()
    """Lines on what of the folder is not read."""
    skipped: Skipped | None = None
    """What a skip list had to do with it."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def in_shards(self) -> bool:
        """Whether the images are parts of larger files."""
        return bool(self.files) and self.files[0].size is not None

    def headers_of(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Return (n, 2) heights and widths of these images as they are stored, and (n,) EXIF
        orientations; from the files where they were not looked at. Raises UserError for a file
        without a header."""
        if self.shapes is None or self.orientations is None:
            return read_headers([self.files[index] for index in indices.tolist()])
        return self.shapes[indices].astype(np.int64), self.orientations[indices]

    def shapes_of(self, indices: NDArray[np.int64], upright: bool) -> NDArray[np.int64]:
        """Return (n, 2) heights and widths of these images as stored, or once they are `upright`.

        Raises UserError for a file without a header.
        """
        shapes, orientations = self.headers_of(indices)
        return swapped(shapes, orientations) if upright else shapes

    @property
    def num_turned(self) -> int:
        """Number of images with an EXIF orientation; of those that were looked at."""
        return 0 if self.orientations is None else int((self.orientations > 1).sum())

    def take(self, indices: NDArray[np.int64]) -> Split:
        """Select the images at these indices, in this order."""
        files = self.files
        return replace(
            self,
            files=files.take(indices) if isinstance(files, Images) else [files[i] for i in indices],
            labels=np.asarray(self.labels)[indices],
            shapes=None if self.shapes is None else self.shapes[indices],
            orientations=None if self.orientations is None else self.orientations[indices],
            sizes=None if self.sizes is None else self.sizes[indices],
        )

    def names(self) -> list[bytes]:
        """List the images' paths below `folder`, CLASS/IMAGE; in shards what they were packed as.

        As the file system has them: they need not be UTF-8.
        """
        files = self.files
        if not isinstance(files, Images):
            return [os.fsencode(os.path.relpath(file.path, self.folder)) for file in files]
        names = files.names_below(self.folder)
        return [unquote_to_bytes(name) for name in names] if self.in_shards else names

    def digest(self) -> str:
        """Hash the names, labels and bytes of all images in their order: 64 hexadecimal digits."""
        digest = hashlib.sha256(b"\0".join(self.names()))
        digest.update(np.asarray(self.labels, np.int32).tobytes())
        if self.sizes is not None:
            digest.update(self.sizes.tobytes())
        return digest.hexdigest()


def read_split(
    root: Path | str,
    split: str,
    skip_list: Path | str | None = None,
    check_files: bool = True,
    on_bad_image: str = "error",
    rule: SplitRule = BY_FOLDERS,
) -> Split:
    """List the images of `root/split/CLASS/`, or of the shards in `root`, or after a `rule`.

    `split` is "train" or "val", for which `folders.SPLIT_FOLDERS` has more names. Links to folders
    are followed; hidden files and metadata are passed over. `skip_list` names files to leave out,
    see `SkipList.read`. `check_files` looks at the header and the end of each image, and keeps what
    it finds in the user's cache for as long as folders or shards do not change; `on_bad_image` says
    what becomes of those that would stop a back end: "error" raises, "skip" leaves them out and
    names them in `left_out`.

    Raises UserError for a missing folder, no classes, an empty class or a bad file.
    """
    assert on_bad_image in ON_BAD_IMAGE, on_bad_image
    root = Path(os.path.abspath(root))
    skips = SkipList.read(root, skip_list) if skip_list is not None else None
    source = find_source(root, split, rule)
    index = None
    if check_files:
        index = cached_index(source.key, source.stamps, source.listing)
    listing = source.listing() if index is None else index.listing
    keep, note = source.select(listing)
    skipped = None
    if skips is not None:
        found, skipped = skips.find(listing.images, source.elsewhere)
        keep[found] = False
    bad = [] if index is None else [(i, text) for i, text in index.bad if keep[i]]
    if bad and on_bad_image == "error":
        raise bad_images(root, rule, [(str(listing.images[i]), text) for i, text in bad])
    notes = (*source.notes, note, *passed_over_notes(listing.passed_over))
    return replace(
        chosen(listing, index, source, keep, bad),
        folder=str(source.folder),
        name=source.name,
        notes=tuple(filter(None, notes)),
        skipped=skipped,
    )


def chosen(
    listing: Listing,
    index: Index | None,
    source: Source,
    keep: NDArray[np.bool_],
    bad: list[tuple[int, str]],
) -> Split:
    """Select the images to `keep` but for the bad ones. UserError for a class that has none."""
    there = np.bincount(listing.labels[keep], minlength=len(listing.classes))
    keep[[i for i, _ in bad]] = False
    good = np.bincount(listing.labels[keep], minlength=len(listing.classes))
    for name, any_left, any_good in zip(listing.classes, there, good, strict=True):
        if not any_good:
            what = "images that can be read" if any_left else "images"
            raise UserError(f"class {name} has no {what} in {source.place}: add some or remove it")
    return Split(
        listing.images,
        listing.labels,
        listing.classes,
        left_out=tuple((str(listing.images[i]), text) for i, text in bad),
        shapes=None if index is None else index.shapes,
        orientations=None if index is None else index.orientations,
        sizes=None if index is None else index.sizes,
    ).take(np.flatnonzero(keep))


def bad_images(root: Path, rule: SplitRule, bad: list[Bad]) -> UserError:
    """Make the error that names the first bad file and says what to type."""
    path, reason = bad[0]
    others = f", and {len(bad) - 1:,} more files are bad" if len(bad) > 1 else ""
    scan = f", which {SCAN} {shlex.quote(str(root))}{rule.flags()} --skip-list FILE writes"
    return UserError(
        f"{path} {reason}{others}: --on-bad-image skip leaves such files out, or name them in "
        f"--skip-list FILE{'' if has_shards(root) else scan}"
    )


def left_out_note(split: Split) -> str:
    """Say in one line what `on_bad_image="skip"` has left out; empty if nothing."""
    if not split.left_out:
        return ""
    path, reason = split.left_out[0]
    number = len(split.left_out)
    files = "1 bad file" if number == 1 else f"{number:,} bad files"
    return f"left out {files} of {number + len(split):,}; the first: {path} {reason}"


def passed_over_notes(found: PassedOver) -> list[str]:
    """Say in a line each how many files beside the images are not read."""
    notes = []
    if found.loose:
        files = "1 loose file" if found.loose == 1 else f"{found.loose:,} loose files"
        what = f"left out {files} beside the class folders"
        notes.append(f"{what}; the first: {found.first_loose}")
    if found.metadata:
        what = "1 file or folder" if found.metadata == 1 else f"{found.metadata:,} files or folders"
        notes.append(f"passed over {what} of metadata; the first: {found.first_metadata}")
    return notes


def notes_of(*splits: Split) -> list[str]:
    """Say, in a line each, what of the data folder is not read, and why: for every command."""
    notes = [unmatched_note([each.skipped for each in splits if each.skipped is not None])]
    for split in splits:
        notes += [left_out_note(split), *split.notes]
    return list(dict.fromkeys(filter(None, notes)))


def check_classes(train: Split, val: Split) -> None:
    """Raise UserError, naming the first few that differ, unless both have the same classes."""
    if train.classes == val.classes:
        return
    parts = []
    only_train = sorted(set(train.classes) - set(val.classes))
    only_val = sorted(set(val.classes) - set(train.classes))
    for text, names in (("only in training", only_train), ("only in validation", only_val)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{text}: {', '.join(names[:3])}{more}")
    pairs = ((name, nearest(name, only_val)) for name in only_train[:100])
    alike = next((f"; is {name} the same as {near}?" for name, near in pairs if near), "")
    raise UserError(
        f"the class folders of training and validation differ ({'; '.join(parts)}{alike}): "
        "both need the same ones"
    )


def check_several(split: Split) -> None:
    """Raise UserError for images of one class, on which any network is right."""
    if len(split.classes) == 1:
        where = "the shards in " if split.in_shards else ""
        raise UserError(
            f"{where}{split.folder} has one class, {split.classes[0]}: there is nothing to tell "
            "apart; expected the folders of two classes or more"
        )


class BadImage(UserError):
    """A file that looks like an image but cannot be decoded, or is gone."""

    def __init__(self, file: ImageFile, reason: str, remedy: str) -> None:
        super().__init__(file, reason, remedy)
        self.file = file
        self.reason = reason
        """What is wrong, in words that continue a sentence that begins with the file's name."""
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.file} {self.reason}: {self.remedy}"


def undecodable(file: ImageFile, reason: Exception) -> UserError:
    """Make the error for a file that looks like an image but cannot be decoded, or is gone."""
    if isinstance(reason, OSError) and (limit := system_limit(reason)):
        return limit
    if not os.path.exists(file.path):
        return BadImage(
            file,
            "is gone since the images were listed",
            "start again; should that name it again, the index of the files is old: "
            f"rm -r {shlex.quote(str(index_folder()))} forgets all",
        )
    text = " ".join(str(reason).split())
    if not isinstance(reason, Damage):
        text = f"cannot be decoded ({text})"
    remedy = "name it in --skip-list"
    if file.size is None:  # `prepare scan` does not read shards
        remedy = f"remove it or name it in --skip-list; {SCAN} DIR --decode finds all such files"
    return BadImage(file, text, remedy)


def read_headers(files: Sequence[ImageFile]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Read (N, 2) heights and widths, and EXIF orientations. UserError for a file without any."""
    shapes, orientations = [], []
    for file in files:
        try:
            with file.open() as stream, Image.open(stream) as image:
                width, height = stored_size(image)
                shapes.append((height, width))
                orientations.append(orientation_of(image))
        except Exception as error:
            raise undecodable(file, error) from error
    return np.array(shapes, np.int64), np.array(orientations, np.int8)
