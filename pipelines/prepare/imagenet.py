"""`prepare imagenet`: class folders from the archives of ILSVRC-2012, or from Kaggle's folders.

torchvision's readers of the same archives take only those of the official checksum, unpack all of
them once more than needed, and start from the beginning after an interruption.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from pipelines.datasets.folders import class_names
from pipelines.datasets.images import status_of
from pipelines.datasets.known import IMAGENET_CLASSES, IMAGENET_COUNTS
from pipelines.datasets.manifest import NAME, read_manifest
from pipelines.errors import UserError
from pipelines.files import atomic_write_in, scratch_folder, write_object
from pipelines.prepare import archives
from pipelines.prepare.imagenet_labels import (
    DEVKIT,
    VAL_IMAGE,
    WNID,
    read_blacklist,
    read_labels,
)

ARCHIVES = {"val": "ILSVRC2012_img_val.tar", "train": "ILSVRC2012_img_train.tar"}
"""The small one first: it shows soon what is wrong."""
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", ".")
"""Where the folders are that Kaggle's archive unpacks to: train/ by class, val/ flat."""
TRAIN_IMAGE = re.compile(r"n\d{8}_\d+\.JPEG", re.ASCII)
BLOCK_LOSS = 0.02
"""Share that file systems add to the bytes of ImageNet's images: half a block of 4 KiB each."""


@dataclass
class Extracted:
    """The outcome of unpacking one archive."""

    classes: Counter[str] = field(default_factory=Counter)
    """WNID -> images."""
    written: int = 0
    left_out: list[str] = field(default_factory=list)
    """Names of the blacklisted ones."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join((*reversed(ARCHIVES.values()), DEVKIT))
    add(
        "archives",
        type=Path,
        metavar="ARCHIVES",
        help=f"folder with {names}; or with what Kaggle's archive unpacks to, whose images are "
        "linked, or copied to another disk",
    )
    add("dst", type=Path, metavar="DST", help="image folder to make or complete")
    add("--split", choices=("train", "val"), help="only this one; default: both")
    add(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help="in place of the devkit: a line per validation image, WNID or FILENAME WNID",
    )
    add(
        "--blacklist",
        type=Path,
        metavar="FILE",
        help="numbers of validation images to leave out, one a line, as in the ILSVRC-2014 "
        "devkit; default: all 50,000 are kept",
    )


def run(args: argparse.Namespace) -> int:
    """Unpack the archives; returns 0. Raises UserError naming the archive, file or flag."""
    if args.split == "train" and (args.val_labels or args.blacklist):
        flag = "--val-labels" if args.val_labels else "--blacklist"
        raise UserError(f"{flag} is about validation images: not with --split train")
    sources = find_sources(args.archives, args.split)
    labels = read_labels(args.archives, args.val_labels) if "val" in sources else {}
    blacklist = read_blacklist(args.blacklist) if args.blacklist else frozenset()
    check_blacklisted(args.dst, labels, blacklist)
    check_space(args.dst, sources)
    with scratch_folder(args.dst) as scratch:
        for split, path in sources.items():
            folder = args.dst / split
            if path.is_dir():
                found = link(images_in(path, split, labels, blacklist), folder, scratch)
            else:
                with path.open("rb") as archive:
                    if split == "train":
                        images = train_images(archive, path)
                    else:
                        images = val_images(archive, path, labels, blacklist)
                    found = extract(archive, path, images, folder, scratch)
            archives.check_counts(folder, found.classes)
            record(args.dst, split, path, found)
            report(args.dst, split, found)
    return 0


def find_sources(folder: Path, only: str | None) -> dict[str, Path]:
    """Find the archives, or Kaggle's folders, of both splits or of one: split -> path."""
    wanted = [split for split in ARCHIVES if only in (split, None)]
    paths = {split: folder / ARCHIVES[split] for split in wanted}
    for place in KAGGLE:
        unpacked = {split: folder / place / split for split in wanted}
        if not any(map(Path.is_file, paths.values())) and all(map(Path.is_dir, unpacked.values())):
            return unpacked
    for split, path in paths.items():
        if not path.is_file():
            other = "val" if split == "train" else "train"
            raise UserError(f"{folder} has no {path.name}: put it there or give --split {other}")
    return paths


def check_blacklisted(dst: Path, labels: dict[int, str], blacklist: frozenset[int]) -> None:
    for number in blacklist & labels.keys():
        path = dst / "val" / labels[number] / f"ILSVRC2012_val_{number:08}.JPEG"
        if path.exists():
            raise UserError(
                f"{path} is blacklisted but there, from a call without --blacklist: remove "
                f"{dst / 'val'} and call again"
            )


def check_space(dst: Path, paths: dict[str, Path]) -> None:
    """Raise UserError if the disk has no room for what is still to be written.

    Of Kaggle's folders that is not known without looking at each image.
    """
    if all(path.is_dir() for path in paths.values()):
        return
    there = sum(
        entry.stat().st_size
        for split in paths
        for name in class_names(dst / split)
        for entry in os.scandir(dst / split / name)
    )
    needed = sum(path.stat().st_size for path in paths.values()) * (1 + BLOCK_LOSS) - there
    folder = next(parent for parent in (dst, *dst.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{dst} has {free / 1e9:,.1f} GB free and needs {needed / 1e9:,.1f} GB: make room or "
            "name another folder"
        )


def train_images(archive: IO[bytes], path: Path) -> Iterator[tuple[str | None, archives.Member]]:
    """Yield each image and its WNID from the archive of archives n01440764.tar, one a class."""
    for inner in archives.read_members(archive, path.name, end=path.stat().st_size):
        wnid = inner.name.removesuffix(".tar")
        if not WNID.fullmatch(wnid):
            raise UserError(f"{path}: {inner.name!r} is refused: n01440764.tar was expected")
        name = f"{path.name}: {inner.name}"
        for image in archives.read_members(archive, name, inner.start, inner.end):
            if not TRAIN_IMAGE.fullmatch(image.name):
                raise UserError(f"{name}: {image.name!r} is refused: {wnid}_1.JPEG was expected")
            yield wnid, image


def val_images(
    archive: IO[bytes], path: Path, labels: dict[int, str], blacklist: frozenset[int]
) -> Iterator[tuple[str | None, archives.Member]]:
    """Yield each image and its WNID; None as the WNID of a blacklisted image."""
    for image in archives.read_members(archive, path.name, end=path.stat().st_size):
        match = VAL_IMAGE.fullmatch(image.name)
        if match is None:
            raise UserError(
                f"{path}: {image.name!r} is refused: ILSVRC2012_val_00000001.JPEG was expected"
            )
        yield label_of(int(match[1]), path, labels, blacklist), image


def label_of(
    number: int, path: Path, labels: dict[int, str], blacklist: frozenset[int]
) -> str | None:
    """Return the WNID of a validation image; None if it is blacklisted. UserError without one."""
    if number not in labels:
        raise UserError(
            f"{path}: ILSVRC2012_val_{number:08}.JPEG has no label; there are {len(labels):,}"
        )
    return None if number in blacklist else labels[number]


def images_in(
    folder: Path, split: str, labels: dict[int, str], blacklist: frozenset[int]
) -> Iterator[tuple[str | None, Path]]:
    """Yield each image of one of Kaggle's folders and its WNID; None for a blacklisted one.

    Raises UserError for files that do not belong there.
    """
    if split == "val":
        for path in sorted(folder.iterdir()):
            match = VAL_IMAGE.fullmatch(path.name)
            if match is None:
                raise UserError(
                    f"{path} is refused: a flat ILSVRC2012_val_00000001.JPEG is expected"
                )
            yield label_of(int(match[1]), folder, labels, blacklist), path
        return
    for wnid in class_names(folder):
        if not WNID.fullmatch(wnid):
            raise UserError(f"{folder / wnid} is refused: a folder n01440764 was expected")
        for path in sorted((folder / wnid).iterdir()):
            if not TRAIN_IMAGE.fullmatch(path.name):
                raise UserError(f"{path} is refused: {wnid}_1.JPEG was expected")
            yield wnid, path


def link(images: Iterable[tuple[str | None, Path]], folder: Path, scratch: Path) -> Extracted:
    """Link the images that are not in `folder` yet; to another disk they are copied."""
    found = Extracted()
    for wnid, path in tqdm(images, unit=" images", desc=folder.name, disable=None):
        if wnid is None:
            found.left_out.append(path.name)
            continue
        target, temporary = folder / wnid / path.name, scratch / str(os.getpid())
        there = status_of(target)
        if there is None or there.st_size != path.stat().st_size:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, temporary)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                    raise
                shutil.copyfile(path, temporary)
            temporary.replace(target)
            found.written += 1
        found.classes[wnid] += 1
    return found


def extract(
    archive: IO[bytes],
    path: Path,
    images: Iterator[tuple[str | None, archives.Member]],
    folder: Path,
    scratch: Path,
) -> Extracted:
    """Write the images that are not in `folder` yet."""
    found = Extracted()
    size = path.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=folder.name, disable=None) as bar:
        for wnid, image in images:
            if wnid is None:
                found.left_out.append(image.name)
            else:
                target = folder / wnid / image.name
                there = status_of(target)
                if there is None or there.st_size != image.size:
                    with atomic_write_in(scratch, target) as file:
                        file.writelines(archives.read_bytes(archive, path.name, image))
                    found.written += 1
                found.classes[wnid] += 1
            bar.update(image.end - bar.n)
        bar.update(size - bar.n)
    return found


def record(dst: Path, split: str, path: Path, found: Extracted) -> None:
    """Describe a split in dataset.json; the entry of the other split stays."""
    manifest = read_manifest(dst)
    source: dict[str, Any] = {"archive": path.name, "archive_bytes": path.stat().st_size}
    if path.is_dir():
        source = {"folder": str(path.resolve())}
    entry = source | {
        "images": found.classes.total(),
        "classes": len(found.classes),
    }
    manifest["dataset"] = "ImageNet"
    if split == "val":
        entry["left_out"] = found.left_out
        # DAWNBench's word: true where accuracy is over all images, the blacklisted ones too.
        manifest["used_blacklist"] = not found.left_out
    manifest["splits"] = manifest.get("splits", {}) | {split: entry}
    write_object(dst / NAME, manifest)


def report(dst: Path, split: str, found: Extracted) -> None:
    total, classes = found.classes.total(), len(found.classes)
    lines = [
        f"{split}: {total:,} images in {classes:,} classes in {dst / split}; "
        f"{found.written:,} written now, {total - found.written:,} were there"
    ]
    if found.left_out:
        lines.append(f"{split}: {len(found.left_out):,} blacklisted images are left out")
    images = IMAGENET_COUNTS[split]
    if (total + len(found.left_out), classes) != (images, IMAGENET_CLASSES):
        lines.append(
            f"{split}: note: this is not all of ILSVRC-2012, whose {ARCHIVES[split]} has "
            f"{images:,} images in {IMAGENET_CLASSES:,} classes"
        )
    print("\n".join(lines), flush=True)  # noqa: T201
