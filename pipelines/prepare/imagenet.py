"""`prepare imagenet`: class folders from the official archives of ILSVRC-2012.

torchvision's readers of the same archives take only those of the official checksum, unpack all of
them once more than needed, and start from the beginning after an interruption.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from pipelines.datasets.folders import class_names
from pipelines.datasets.images import status_of
from pipelines.datasets.known import IMAGENET_CLASSES, IMAGENET_COUNTS
from pipelines.datasets.manifest import NAME, read_manifest
from pipelines.errors import UserError
from pipelines.files import atomic_write_in, read_text, scratch_folder, write_object
from pipelines.prepare import archives

WNID = re.compile(r"n\d{8}", re.ASCII)
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"


def read_devkit(path: Path) -> dict[int, str]:
    """Read the devkit, ILSVRC2012_devkit_t12.tar.gz: number of a validation image (from 1) -> WNID.

    Raises UserError where it is damaged or scipy, which reads its MATLAB file, is missing.
    """
    found: dict[str, bytes] = {}
    with archives.open_gzip(path) as archive:
        for member in archives.read_members(archive, path.name):
            for wanted in (GROUND_TRUTH, META):
                if f"/{member.name}".endswith(f"/{wanted}"):
                    found[wanted] = archives.read_whole(archive, path.name, member)
    for wanted in (GROUND_TRUTH, META):
        if wanted not in found:
            raise UserError(f"{path} has no {wanted}: download it again or give --val-labels FILE")
    wnids = read_meta(found[META], path)
    labels = {}
    for number, line in enumerate(found[GROUND_TRUTH].decode("ascii", "replace").split(), start=1):
        if not line.isdigit() or int(line) not in wnids:
            raise UserError(f"{path}: {GROUND_TRUTH}:{number}: no class has the number {line!r}")
        labels[number] = wnids[int(line)]
    return labels


def read_meta(content: bytes, path: Path) -> dict[int, str]:
    """Read the devkit's meta.mat: ILSVRC2012_ID -> WNID."""
    try:
        loadmat = import_module("scipy.io").loadmat
    except ImportError:
        raise UserError(
            f"{path.name} has a MATLAB file, which scipy reads: pip install scipy, or give "
            "--val-labels FILE"
        ) from None
    try:
        synsets = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        wnids = {
            int(number): str(wnid)
            for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        }
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: {META} cannot be read ({text}): download it again") from None
    for wnid in wnids.values():
        if not WNID.fullmatch(wnid):
            raise UserError(f"{path}: {META} has a class {wnid!r}: n and eight digits are expected")
    return wnids


def read_label_file(path: Path) -> dict[int, str]:
    """Read lines `WNID` or `FILENAME WNID`: number of a validation image (from 1) -> WNID.

    Lines with a WNID alone are in the order of the images. UserError names the first wrong line.
    """
    labels: dict[int, str] = {}
    for number, line in enumerate(read_lines(path, "--val-labels"), start=1):
        *names, wnid = line.split() or [""]
        image = VAL_IMAGE.fullmatch(names[0]) if len(names) == 1 else None
        if not WNID.fullmatch(wnid) or len(names) > 1 or (names and image is None):
            raise UserError(
                f"--val-labels: {path}:{number}: n01440764 or ILSVRC2012_val_00000001.JPEG "
                f"n01440764 is expected, not {line[:80]!r}"
            )
        image_number = int(image[1]) if image else number
        if labels.setdefault(image_number, wnid) != wnid:
            raise UserError(f"--val-labels: {path}:{number}: image {image_number} has two classes")
    return labels


def read_blacklist(path: Path) -> frozenset[int]:
    """Read the numbers (from 1) of the validation images to leave out, one a line."""
    lines = read_lines(path, "--blacklist")
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"[0-9]{1,8}", line):
            raise UserError(
                f"--blacklist: {path}:{number}: the number of a validation image is expected, "
                f"not {line[:80]!r}"
            )
    return frozenset(map(int, lines))


def read_lines(path: Path, flag: str) -> list[str]:
    """Read the stripped lines of a file, without the empty ones at its end."""
    try:
        lines = read_text(path).rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: cannot read {path}: {error}") from None
    return [line.strip() for line in lines]


ARCHIVES = {"val": "ILSVRC2012_img_val.tar", "train": "ILSVRC2012_img_train.tar"}
"""The small one first: it shows soon what is wrong."""
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
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
    add("archives", type=Path, metavar="ARCHIVES", help=f"folder with {names}")
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
    paths = find_archives(args.archives, args.split)
    labels = read_labels(args.archives, args.val_labels) if "val" in paths else {}
    blacklist = read_blacklist(args.blacklist) if args.blacklist else frozenset()
    check_blacklisted(args.dst, labels, blacklist)
    check_space(args.dst, paths)
    with scratch_folder(args.dst) as scratch:
        for split, path in paths.items():
            with path.open("rb") as archive:
                if split == "train":
                    images = train_images(archive, path)
                else:
                    images = val_images(archive, path, labels, blacklist)
                found = extract(archive, path, images, args.dst / split, scratch)
            archives.check_counts(args.dst / split, found.classes)
            record(args.dst, split, path, found)
            report(args.dst, split, found)
    return 0


def find_archives(folder: Path, only: str | None) -> dict[str, Path]:
    """Find the archives of both splits or of one: split -> path."""
    paths = {split: folder / name for split, name in ARCHIVES.items() if only in (split, None)}
    for split, path in paths.items():
        if not path.is_file():
            other = "val" if split == "train" else "train"
            raise UserError(f"{folder} has no {path.name}: put it there or give --split {other}")
    return paths


def read_labels(folder: Path, label_file: Path | None) -> dict[int, str]:
    """Read the labels: number of a validation image (from 1) -> WNID."""
    if label_file is not None:
        return read_label_file(label_file)
    devkit = folder / DEVKIT
    if not devkit.is_file():
        raise UserError(f"{folder} has no {DEVKIT}: put it there or give --val-labels FILE")
    return read_devkit(devkit)


def check_blacklisted(dst: Path, labels: dict[int, str], blacklist: frozenset[int]) -> None:
    for number in blacklist & labels.keys():
        path = dst / "val" / labels[number] / f"ILSVRC2012_val_{number:08}.JPEG"
        if path.exists():
            raise UserError(
                f"{path} is blacklisted but there, from a call without --blacklist: remove "
                f"{dst / 'val'} and call again"
            )


def check_space(dst: Path, paths: dict[str, Path]) -> None:
    """Raise UserError if the disk has no room for what is still to be written."""
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
        number = int(match[1])
        if number not in labels:
            raise UserError(f"{path}: {image.name} has no label; there are {len(labels):,}")
        yield None if number in blacklist else labels[number], image


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
    entry: dict[str, Any] = {
        "archive": path.name,
        "archive_bytes": path.stat().st_size,
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
