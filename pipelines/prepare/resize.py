"""`prepare resize`: smaller JPEGs of all images that a model sees as it sees the originals.

What is done to the pixels, and why; figures are of ImageNet photographs, a copy of 160 px, mean
difference of 255 from the original in the 128-px validation view:

- Colour profiles are not applied, as by loaders, nor is EXIF orientation, which is for the recipe
  to say. The orientation tag and an RGB profile are kept; all other metadata is dropped.
- What is no RGB becomes it as in the loaders, by `pixels.rgb`; films: the first frame.
- Lanczos keeps what the loader's own triangular filter then needs: 1.76, where triangular twice is
  2.37 (before JPEG).
- Chroma is not subsampled: quality 85 then has the bytes of quality 90 with 4:2:0 and is nearer to
  the original (2.90 to 3.23; quality 90: 2.58), and decodes in nearly the same time.
- Large JPEGs are decoded at 1/2, 1/4 or 1/8 where that leaves twice the size asked for. It moves
  the copies by .4 of 255, a fourth of what JPEG at quality 90 does.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pipelines.cli import add_rule_flags
from pipelines.datasets.checks import check_file, damage
from pipelines.datasets.folders import SPLIT_FOLDERS, find_split, list_folder
from pipelines.datasets.images import ImageFile, changed_ns, status_of
from pipelines.datasets.labels import read_table
from pipelines.datasets.manifest import NAME, known_facts, read_manifest
from pipelines.datasets.pixels import ORIENTATION, orientation_of, rgb, stored_size
from pipelines.datasets.rule import SplitRule
from pipelines.datasets.source import check_no_shards, undivided
from pipelines.datasets.split import passed_over_notes
from pipelines.errors import UserError
from pipelines.files import Row, atomic_write_in, scratch_folder, write_object
from pipelines.workers import in_processes, num_cores

SCALED_DECODE_MARGIN = 2
"""A scaled decode has at least this times the length that is asked for."""


@dataclass(frozen=True)
class Copy:
    """The content of a file with a smaller image."""

    content: bytes
    verbatim: bool
    """Whether these are the bytes of the source."""


def shrink(source: Path | str, short_sides: tuple[int, ...], quality: int) -> list[Copy]:
    """Encode the image as JPEGs whose short sides have these lengths in pixels; none is enlarged.

    The aspect ratio is kept, to the nearest pixel. Greyscale and RGB JPEGs that are small enough
    are kept bit for bit. Raises what Pillow raises for an image that cannot be decoded.
    """
    with Image.open(source) as image:
        size, box = stored_size(image), None
        if image.format == "JPEG":
            margin = SCALED_DECODE_MARGIN * max(short_sides) / min(size)
            scaled = image.draft(None, (math.ceil(size[0] * margin), math.ceil(size[1] * margin)))
            box = scaled[1] if scaled else None
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        metadata = kept_metadata(image)
        pixels = rgb(image)
    pixels.info = {}  # or else its comment would be saved too
    copies = []
    for short_side in short_sides:
        if min(size) > short_side:
            target = target_size(size, short_side)
            resized = pixels.resize(target, Image.Resampling.LANCZOS, box=box)
            copies.append(Copy(encode(resized, quality, metadata), verbatim=False))
        elif plain:
            copies.append(Copy(Path(source).read_bytes(), verbatim=True))
        else:
            copies.append(Copy(encode(pixels, quality, metadata), verbatim=False))
    return copies


def target_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return (width, height) with this short side and the same aspect ratio."""
    width, height = (max(short_side, round(side * short_side / min(size))) for side in size)
    return width, height


def kept_metadata(image: Image.Image) -> dict[str, bytes]:
    """Return arguments for saving a JPEG: the orientation tag and the profile, if it is of RGB."""
    kept = {}
    if (orientation := orientation_of(image)) != 1:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        kept["exif"] = exif.tobytes()
    profile = image.info.get("icc_profile")
    if profile and profile[16:20] == b"RGB ":
        kept["icc_profile"] = profile
    return kept


def encode(image: Image.Image, quality: int, metadata: dict[str, bytes]) -> bytes:
    """Encode a baseline JPEG without chroma subsampling."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:4:4", **metadata)
    return file.getvalue()


ALL_SPLITS = tuple(name for each in SPLIT_FOLDERS.values() for name in each)
CHUNK = 16
"""Images in a job: Ctrl-C waits until the current jobs end."""


@dataclass(frozen=True)
class Copied:
    """The outcome of one image."""

    name: str
    """Its path from the source's folder on, SPLIT/CLASS/FILE."""
    num_bytes: int = 0
    copies: tuple[tuple[str, int], ...] = ()
    """Per short side: "written", "verbatim" or "there", and the bytes of the copy."""
    error: str | None = None


@dataclass
class Tally:
    """The outcomes of all images, counted."""

    num_bytes: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    """Split's folder, or "all" without one -> images that have their copies."""
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
        first = image.name.partition("/")[0]
        self.splits[first if first in ALL_SPLITS else "all"] += 1
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
    add_rule_flags(parser)
    add("--quality", type=int, default=90, metavar="Q", help="of the JPEGs, 1 to 95; default 90")
    add("--workers", type=int, default=num_cores(), metavar="K", help="processes; default: a core")


def run(args: argparse.Namespace) -> int:
    """Write the copies; returns 1 if images are damaged. UserError names the flag or file."""
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")
    check_no_shards(args.src, "prepare resize")
    resizer = Resizer(args.src, args.dst, tuple(sorted(set(args.short_side))), args.quality)
    resizer.check()
    rule = SplitRule(val_fraction=args.val_fraction, labels=args.labels)
    names, notes = list_images(args.src, rule)
    resizer.check_apart(names)
    facts = {tree: resizer.facts_of(tree) for tree in resizer.trees}
    tally = Tally()
    started = time.perf_counter()
    with scratch_folder(args.dst) as scratch:
        for tree, fact in facts.items():
            write_object(tree / NAME, fact | {"complete": False})
        jobs = (names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
        with tqdm(total=len(names), unit="image", smoothing=0.05, disable=None) as bar:
            for done in in_processes(partial(resizer.copy_images, scratch), jobs, args.workers):
                for image in done:
                    tally.add(image, resizer.sides)
                bar.update(len(done))
        tally.damaged.sort()
        ends = {"images": dict(tally.splits), "damaged": [name for name, _ in tally.damaged]}
        for tree, fact in facts.items():
            write_object(tree / NAME, fact | {"complete": True} | ends)
    resizer.report(tally, notes, time.perf_counter() - started)
    return 1 if tally.damaged else 0


def list_images(src: Path, rule: SplitRule) -> tuple[list[str], list[str]]:
    """List the paths of all images in `src`, sorted, and notes on what is not copied.

    All of them, on whichever side of a rule. UserError for a split that training would stop at, and
    if two copies would have the same name.
    """
    names: list[str] = []
    notes: list[str] = []
    if rule.labels is not None:
        table = read_table(Path(os.path.abspath(src)), rule.labels)
        names += sorted((os.path.relpath(row.path, src) for row in table.rows), key=os.path.split)
        splits = []
    elif rule.val_fraction is not None:
        splits = [os.path.relpath(undivided(src), src)]
    else:
        splits = [name for name in ALL_SPLITS if (src / name).is_dir()]
    read = [next((n for n in each if n in splits), "") for each in SPLIT_FOLDERS.values()]
    for name in splits:
        try:
            listing = list_folder(src / name)
        except UserError as error:
            if rule.given or name in read:
                raise
            notes.append(f"no copies of {name}/, which training does not read: {error}")
            continue
        names += map(os.fsdecode, listing.images.names_below(str(src)))
        notes += passed_over_notes(listing.passed_over)
    if not names:
        find_split(src, "train")  # which says what is there instead
    for _, files in groupby(names, os.path.dirname):
        stems: dict[str, str] = {}
        for file in files:
            if (other := stems.setdefault(target_name(file), file)) != file:
                raise UserError(
                    f"{src}: the copies of {other} and {file} would have the same name: rename one"
                )
    return names, notes


def target_name(name: str) -> str:
    return f"{os.path.splitext(name)[0]}.jpg"


def size_if_newer(path: Path, time_ns: int) -> int:
    """Return the bytes of a file that is not older than this; otherwise 0."""
    found = status_of(path)
    return found.st_size if found is not None and found.st_mtime_ns >= time_ns else 0


@dataclass(frozen=True)
class Resizer:
    """Makes smaller copies of the images in `src`: one tree in `dst` for each short side."""

    src: Path
    dst: Path
    sides: tuple[int, ...]
    """Lengths of the short sides in pixels, ascending."""
    quality: int
    """Of the JPEGs, 1 to 95."""

    @property
    def trees(self) -> dict[Path, int]:
        """The folders of the copies and their short sides."""
        return {self.dst / str(side): side for side in self.sides}

    def check(self) -> None:
        """Raise UserError, naming the flag or folder, for what cannot be made."""
        if self.sides[0] < 8:
            raise UserError(f"--short-side must be at least 8 pixels, not {self.sides[0]}")
        if not 1 <= self.quality <= 95:
            raise UserError(f"--quality must be from 1 to 95, not {self.quality}")
        for folder in (self.dst, *self.trees):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file: DST must be a folder, or new")
            if folder != self.dst and folder.resolve() == self.src.resolve():
                raise UserError(f"{folder} is {self.src} itself: name another DST")

    def check_apart(self, names: list[str]) -> None:
        """Raise UserError for a tree of copies that is a folder of the source's images."""
        first = {name.partition("/")[0] for name in names}
        for tree in self.trees:
            if self.dst.resolve() == self.src.resolve() and tree.name in first:
                raise UserError(f"{tree} holds images of {self.src} itself: name another DST")

    def facts_of(self, tree: Path) -> Row:
        """Describe a tree for its dataset.json. UserError if it was made with another quality."""
        origin = known_facts(self.src)
        found = read_manifest(tree).get("quality", self.quality)
        if found != self.quality:
            raise UserError(
                f"--quality: {tree} was made with {found}, not {self.quality}: name another DST or "
                "remove it"
            )
        kept = {key: origin[key] for key in ("dataset", "used_blacklist") if key in origin}
        return {"short_side": self.trees[tree], "quality": self.quality} | kept

    def copy_images(self, scratch: Path, names: list[str]) -> list[Copied]:
        """Write the missing copies of some images. Raises OSError if that fails."""
        return [self.copy_image(scratch, name) for name in names]

    def copy_image(self, scratch: Path, name: str) -> Copied:
        source = self.src / name
        try:
            before = source.stat()
        except OSError as error:
            return Copied(name, error=damage(error).text)
        targets = [tree / target_name(name) for tree in self.trees]
        there = [size_if_newer(target, changed_ns(before)) for target in targets]
        if all(there):
            return Copied(name, before.st_size, tuple(("there", size) for size in there))
        try:
            check_file(ImageFile(str(source)))
            made = shrink(source, self.sides, self.quality)
        except Exception as error:
            return Copied(name, error=damage(error).text)
        copies = []
        for target, size, copy in zip(targets, there, made, strict=True):
            if not size:
                with atomic_write_in(scratch, target) as file:
                    file.write(copy.content)
            what = "there" if size else "verbatim" if copy.verbatim else "written"
            copies.append((what, size or len(copy.content)))
        return Copied(name, before.st_size, tuple(copies))

    def report(self, tally: Tally, notes: list[str], seconds: float) -> None:
        """Print the notes and a summary, and damaged images on standard error."""
        for name, error in tally.damaged:
            print(f"{self.src / name}: {error}", file=sys.stderr)  # noqa: T201
        images, megabytes = tally.splits.total(), tally.num_bytes / 1e6
        lines = [*notes]
        for tree, side in self.trees.items():
            count = {what: tally.copies[side, what] for what in ("written", "verbatim", "there")}
            lines.append(
                f"{tree}: {images:,} images, "
                f"{tally.copies[side, 'bytes'] / 1e6:,.1f} MB of {megabytes:,.1f} MB; "
                f"{count['written']:,} written, {count['verbatim']:,} copied bit for bit, "
                f"{count['there']:,} were there"
            )
        rate = tally.written / seconds
        lines.append(f"{tally.written:,} images in {seconds:,.1f} s, {rate:,.0f} images/s")
        if tally.damaged:
            number = len(tally.damaged)
            lines.append(f"{number:,} damaged images have no copy; they are listed above")
        print("\n".join(lines), flush=True)  # noqa: T201
