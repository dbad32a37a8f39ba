"""Image folders, `DIR/train/CLASS` and `DIR/val/CLASS`: images as torchvision's ImageFolder lists
them, those in folders below a class folder too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from pipelines.datasets.images import Images, Listing, PassedOver
from pipelines.datasets.manifest import NAME as DATASET
from pipelines.datasets.manifest import known_facts
from pipelines.errors import UserError

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
"""Split -> its folder, the first of these that is there."""
METADATA_FOLDERS = frozenset(
    {
        *("@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN"),
        *("System Volume Information", "__MACOSX", "lost+found"),
    }
)
"""What storage systems, archivers and file managers leave in folders; some hold thumbnails."""
METADATA_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".ini", ".db")
"""Of files that are no images: lists, descriptions, desktop.ini, Thumbs.db."""
ARCHIVES = (".tar", ".tgz", ".tar.gz", ".idx")


def find_split(root: Path, split: str) -> Path:
    """Find the folder of a split; raises UserError if it or `root` is missing."""
    check_root(root)
    names = SPLIT_FOLDERS[split]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise no_split(root, split)


def check_root(root: Path) -> None:
    """Raise UserError unless the data folder is there."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: --data takes a folder with train/ and val/")


def no_split(root: Path, split: str) -> UserError:
    """Make the error for a data folder without the folder of a split, after what it has instead."""
    found = look(str(root))
    if found.images and all(name.lower().endswith(ARCHIVES) for name in found.images):
        return UserError(
            f"{root} holds tar files that prepare shard has not written (no shards.json): unpack "
            f"them to DIR/train/CLASS/IMAGE; {SHARD} DIR DST makes shards of that"
        )
    if "ILSVRC" in found.folders:
        return UserError(
            f"{root} is ImageNet as Kaggle has it: {PREPARE_IMAGENET} {root} DST first"
        )
    first, *others = SPLIT_FOLDERS[split]
    names = f"{first}/" + (f" (nor {', '.join(others)})" if others else "")
    text = f"{root} has no folder {names}: expected {first}/CLASS/IMAGE"
    if split == "val" and (root / "train").is_dir():
        text += ", or --val-fraction 0.2 takes a share of train/"
    elif {*found.folders}.isdisjoint(chain(*SPLIT_FOLDERS.values())):
        if found.folders:
            text += f", or --val-fraction 0.2 reads {root}/CLASS/IMAGE"
        elif found.images:
            text += ", or --labels FILE.csv says what class each image is of"
    return UserError(text)


PREPARE_IMAGENET = "python -m pipelines.prepare imagenet"
SHARD = "python -m pipelines.prepare shard"


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
    """List the folders in `folder`, sorted, without hidden ones and metadata; none where there is
    no such folder."""
    return look(str(folder)).folders if folder.is_dir() else []


@dataclass(frozen=True)
class Branch:
    """A folder of the tree."""

    path: str
    identity: tuple[int, int]
    """The same for all paths that lead to it."""
    stamp: tuple[int, int, int]
    """When its entries and itself last changed, in ns, and how many entries it has."""
    images: list[str]
    """Names of its files but for the metadata, sorted."""
    folders: list[str]
    metadata: list[str]


def look(path: str) -> Branch:
    """List a folder."""
    status = os.stat(path)
    images: list[str] = []
    folders: list[str] = []
    metadata: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                metadata.append(name)
            elif is_folder(entry):
                (metadata if name in METADATA_FOLDERS else folders).append(name)
            else:
                (metadata if name.lower().endswith(METADATA_SUFFIXES) else images).append(name)
    number = len(images) + len(folders) + len(metadata)
    return Branch(
        path,
        (status.st_dev, status.st_ino),
        (status.st_mtime_ns, status.st_ctime_ns, number),
        sorted(images),
        sorted(folders),
        sorted(metadata),
    )


def below(path: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Branch]:
    """Yield a folder and all below it. Links to folders are followed, but not to one of `above`,
    in which they lie themselves."""
    branch = look(path)
    if branch.identity not in above:
        yield branch
        for name in branch.folders:
            yield from below(f"{path}/{name}", above | {branch.identity})


def tree(path: str) -> list[Branch]:
    """List a folder and all below it in the order of torchvision's ImageFolder, by their paths."""
    return sorted(below(path), key=lambda branch: branch.path)


def classes_in(top: Branch) -> tuple[str, ...]:
    """List the classes of a split, whose own folder `top` is: its folders but for data sets."""
    return tuple(name for name in top.folders if not is_dataset(f"{top.path}/{name}"))


def is_dataset(path: str) -> bool:
    """Whether a folder is a data set by itself: copies that `prepare resize` has made, or what has
    a dataset.json of whatever program and no image beside it."""
    if not os.path.exists(f"{path}/{DATASET}"):
        return False
    return "short_side" in known_facts(Path(path)) or not look(path).images


def list_folder(folder: Path) -> Listing:
    """List the images of a split, sorted by class, folder and name.

    Raises UserError where there are no classes.
    """
    top = look(str(folder))
    classes = classes_in(top)
    if not classes:
        raise no_classes(top)
    holders: list[str] = []
    labels: list[int] = []
    metadata = [f"{folder}/{name}" for name in {*top.metadata, *top.folders}.difference(classes)]

    def names() -> Iterator[list[str]]:
        for label, name in enumerate(classes):
            for branch in tree(f"{folder}/{name}"):
                holders.append(branch.path)
                labels.append(label)
                metadata.extend(f"{branch.path}/{name}" for name in branch.metadata)
                yield branch.images

    images = Images.packed(holders, names())
    loose = [f"{folder}/{name}" for name in top.images]
    passed_over = PassedOver(*counted(loose), *counted(metadata))
    return Listing(images, np.array(labels, np.int32)[images.holder], classes, passed_over)


def counted(paths: list[str]) -> tuple[int, str]:
    return len(paths), min(paths, default="")


def no_classes(top: Branch) -> UserError:
    """Make the error for a split without class folders."""
    text = f"{top.path} has no class folders"
    if top.images:
        files = "1 loose file" if len(top.images) == 1 else f"{len(top.images):,} loose files"
        text += f" but {files}, the first {top.images[0]}"
        if top.images[0].startswith("ILSVRC2012_val_"):
            folder = os.path.dirname(top.path)
            return UserError(f"{text}: {PREPARE_IMAGENET} {folder} DST sorts ImageNet's by class")
        return UserError(
            f"{text}: expected {top.path}/CLASS/IMAGE, or --labels FILE.csv with the class of each"
        )
    return UserError(f"{text}: expected {top.path}/CLASS/IMAGE")


def list_below(folder: Path) -> Listing:
    """List all images below a folder as if they were of one class."""
    holders: list[str] = []

    def names() -> Iterator[list[str]]:
        for branch in below(str(folder)):
            holders.append(branch.path)
            yield branch.images

    images = Images.packed(holders, names())
    return Listing(images, np.zeros(len(images), np.int32), ("",))


def folder_stamps(folder: Path) -> list[int]:
    """Return what changes when an image comes, goes or is renamed: the stamps of the split's
    folder and of all folders below its classes."""
    top = look(str(folder))
    trees = (tree(f"{folder}/{name}") for name in classes_in(top))
    return [number for branch in chain([top], *trees) for number in branch.stamp]


def tree_stamps(folder: Path) -> list[int]:
    """Return the same of all folders below one."""
    return [number for branch in below(str(folder)) for number in branch.stamp]
