"""`prepare resize SRC DST --short-side S ...`: DST/S/train/CLASS/*.jpg and so on.

Training on small images spends most of its decoding on pixels that it throws away; copies made
once are read several times as fast.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.decoding import damage
from pipelines.errors import UserError
from pipelines.files import scratch_folder, written_in
from pipelines.folder import class_names, is_folder, visible
from pipelines.headers import check_file
from pipelines.images import ImageFile
from pipelines.prepare.manifest import read_manifest, write_manifest
from pipelines.prepare.shrink import shrink
from pipelines.workers import in_processes, num_cores

SPLITS = ("train", "val", "test")
CHUNK = 16
"""Images in a job: Ctrl-C waits for the jobs in hand."""


@dataclass(frozen=True)
class Copied:
    """What became of one image."""

    name: str
    """SPLIT/CLASS/FILE."""
    num_bytes: int = 0
    copies: tuple[tuple[str, int], ...] = ()
    """Per short side: "written", "verbatim" or "there", and the bytes of the copy."""
    error: str | None = None


@dataclass
class Tally:
    """What became of all of them."""

    num_bytes: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    """Split -> images that have their copies."""
    copies: Counter[tuple[int, str]] = field(default_factory=Counter)
    """(short side, "written", "verbatim", "there" or "bytes") -> how many."""
    written: int = 0
    """Images of which a copy was written."""
    damaged: list[tuple[str, str]] = field(default_factory=list)

    def add(self, image: Copied, sides: tuple[int, ...]) -> None:
        if image.error is not None:
            self.damaged.append((image.name, image.error))
            return
        self.num_bytes += image.num_bytes
        self.splits[image.name.partition("/")[0]] += 1
        self.written += any(what != "there" for what, _ in image.copies)
        for side, (what, num_bytes) in zip(sides, image.copies, strict=True):
            self.copies[side, what] += 1
            self.copies[side, "bytes"] += num_bytes


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("src", type=Path, metavar="SRC", help="image folder SRC/train/CLASS/*, SRC/val/CLASS/*")
    add("dst", type=Path, metavar="DST", help="gets an image folder for each length: DST/160, ...")
    add(
        "--short-side",
        type=int,
        nargs="+",
        required=True,
        metavar="S",
        help="pixels; smaller images are not enlarged",
    )
    add("--quality", type=int, default=90, metavar="Q", help="of the JPEGs, 1 to 95; default 90")
    add("--workers", type=int, default=num_cores(), metavar="K", help="processes; default: a core")


def run(args: argparse.Namespace) -> int:
    """0, or 1 where images are damaged. Raises UserError naming the flag, folder or file."""
    sides = tuple(sorted(set(args.short_side)))
    check_flags(args, sides)
    names = list_images(args.src)
    facts = {args.dst / str(side): facts_of(args, side) for side in sides}
    tally = Tally()
    started = time.perf_counter()
    with scratch_folder(args.dst) as scratch:
        for tree, fact in facts.items():
            write_manifest(tree, fact | {"complete": False})
        job = partial(copy_images, args.src, args.dst, sides, args.quality, scratch)
        jobs = (names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
        with tqdm(total=len(names), unit="image", smoothing=0.05, disable=None) as bar:
            for done in in_processes(job, jobs, args.workers):
                for image in done:
                    tally.add(image, sides)
                bar.update(len(done))
        tally.damaged.sort()
        ends = {"images": dict(tally.splits), "damaged": [name for name, _ in tally.damaged]}
        for tree, fact in facts.items():
            write_manifest(tree, fact | {"complete": True} | ends)
    return report(args, sides, tally, time.perf_counter() - started)


def check_flags(args: argparse.Namespace, sides: tuple[int, ...]) -> None:
    if sides[0] < 8:
        raise UserError(f"--short-side must be at least 8 pixels, not {sides[0]}")
    if not 1 <= args.quality <= 95:
        raise UserError(f"--quality must be from 1 to 95, not {args.quality}")
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")
    for folder in (args.dst, *(args.dst / str(side) for side in sides)):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: DST must be a folder, or new")
    for side in sides:
        if (args.dst / str(side)).resolve() == args.src.resolve():
            raise UserError(f"{args.dst}/{side} is {args.src} itself: name another DST")


def list_images(src: Path) -> list[str]:
    """SPLIT/CLASS/FILE of all images, sorted. UserError if two of a class have the same stem."""
    names = []
    for split in SPLITS:
        if not (src / split).is_dir():
            continue
        for folder in class_names(src / split):
            stems: dict[str, str] = {}
            for entry in visible(src / split / folder):
                if is_folder(entry):
                    continue
                name = f"{split}/{folder}/{entry.name}"
                other = stems.setdefault(target_name(name), name)
                if other != name:
                    raise UserError(
                        f"{src}: the copies of {other} and {name} would have the same name: "
                        "rename one"
                    )
            names += sorted(stems.values())
    if not names:
        raise UserError(f"{src} has no images: expected {src}/train/CLASS/IMAGE")
    return names


def target_name(name: str) -> str:
    return str(Path(name).with_suffix(".jpg"))


def facts_of(args: argparse.Namespace, side: int) -> dict[str, Any]:
    """What dataset.json of a tree says from the start. UserError if it was made differently."""
    tree = args.dst / str(side)
    origin = read_manifest(args.src)
    facts: dict[str, Any] = {"short_side": side, "quality": args.quality}
    facts |= {key: origin[key] for key in ("dataset", "used_blacklist") if key in origin}
    quality = read_manifest(tree).get("quality", args.quality)
    if quality != args.quality:
        raise UserError(
            f"--quality: {tree} was made with {quality}, not {args.quality}: name another DST or "
            "remove it"
        )
    return facts


def copy_images(
    src: Path, dst: Path, sides: tuple[int, ...], quality: int, scratch: Path, names: list[str]
) -> list[Copied]:
    """Write what is missing of the copies of some images. Raises OSError if it cannot."""
    return [copy_image(src, dst, sides, quality, scratch, name) for name in names]


def copy_image(
    src: Path, dst: Path, sides: tuple[int, ...], quality: int, scratch: Path, name: str
) -> Copied:
    source = src / name
    try:
        before = source.stat()
    except OSError as error:
        return Copied(name, error=damage(error).text)
    targets = [dst / str(side) / target_name(name) for side in sides]
    there = [size_if_newer(target, before.st_mtime_ns) for target in targets]
    if all(there):
        return Copied(name, before.st_size, tuple(("there", size) for size in there))
    try:
        check_file(ImageFile(str(source)))
        made = shrink(source, sides, quality)
    except Exception as error:
        return Copied(name, error=damage(error).text)
    copies = []
    for target, size, copy in zip(targets, there, made, strict=True):
        if not size:
            with written_in(scratch, target) as file:
                file.write(copy.content)
        what = "there" if size else "verbatim" if copy.verbatim else "written"
        copies.append((what, size or len(copy.content)))
    return Copied(name, before.st_size, tuple(copies))


def size_if_newer(path: Path, mtime_ns: int) -> int:
    """Bytes of a file that is not older; 0 where there is none or an empty one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return found.st_size if found.st_mtime_ns >= mtime_ns else 0


def report(args: argparse.Namespace, sides: tuple[int, ...], tally: Tally, seconds: float) -> int:
    """Print what was done, and damaged images on standard error; returns the exit status."""
    for name, error in tally.damaged:
        print(f"{args.src / name}: {error}", file=sys.stderr)  # noqa: T201
    images = tally.splits.total()
    lines = []
    for side in sides:
        count = {what: tally.copies[side, what] for what in ("written", "verbatim", "there")}
        lines.append(
            f"{args.dst / str(side)}: {images:,} images, "
            f"{tally.copies[side, 'bytes'] / 1e6:,.1f} MB of {tally.num_bytes / 1e6:,.1f} MB; "
            f"{count['written']:,} written, {count['verbatim']:,} copied bit for bit, "
            f"{count['there']:,} were there"
        )
    rate = tally.written / seconds
    lines.append(f"{tally.written:,} images in {seconds:,.1f} s, {rate:,.0f} images/s")
    if tally.damaged:
        lines.append(f"{len(tally.damaged):,} damaged images have no copy; they are listed above")
    print("\n".join(lines), flush=True)  # noqa: T201
    return 1 if tally.damaged else 0
