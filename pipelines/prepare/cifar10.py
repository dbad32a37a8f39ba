"""`prepare cifar10 SRC DST`: train/CLASS/00000.png and val/CLASS/00000.png, pixel for pixel.

The number is the image's place in its split, so that both versions of the archive give the same
files.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pipelines.datasets import CIFAR10_CLASSES
from pipelines.errors import UserError
from pipelines.files import scratch_folder, written_in
from pipelines.prepare.cifar_batches import VERSIONS, Batch, read_batches
from pipelines.prepare.manifest import write_manifest

COUNTS = {"train": 50_000, "val": 10_000}
"""Images of the official data set, in equal shares of ten classes."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = " or ".join(version.archive for version in VERSIONS)
    add("src", type=Path, metavar="SRC", help=f"{names}, or the folder that it unpacks to")
    add("dst", type=Path, metavar="DST", help="image folder to make or to go on with")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status. Raises UserError naming the archive or file."""
    source = find_source(args.src)
    origin = describe(source)
    counts: dict[str, Counter[str]] = {"train": Counter(), "val": Counter()}
    written = 0
    with (
        scratch_folder(args.dst) as scratch,
        tqdm(total=sum(COUNTS.values()), unit="image", disable=None) as bar,
    ):
        for batch in read_batches(source):
            written += write_batch(batch, args.dst, counts[batch.split], scratch)
            bar.update(len(batch.labels))
    for split, classes in counts.items():
        check_counts(args.dst / split, classes)
    report(args.dst, counts, written, origin)
    return 0


def find_source(src: Path) -> Path:
    """SRC, or the archive or unpacked archive in it."""
    if not src.exists():
        raise UserError(f"no file or folder {src}: name cifar-10-python.tar.gz or its folder")
    for version in VERSIONS:
        for path in (src / version.folder, src / version.archive):
            if path.exists():
                return path
    return src


def describe(source: Path) -> dict[str, Any]:
    """What dataset.json says of where the images are from."""
    origin: dict[str, Any] = {"source": source.name}
    if source.is_file():
        with source.open("rb") as file:
            origin["md5"] = hashlib.file_digest(file, "md5").hexdigest()
        origin["bytes"] = source.stat().st_size
    return origin


def write_batch(batch: Batch, dst: Path, classes: Counter[str], scratch: Path) -> int:
    """Write the images that are not there yet, and count all in `classes`; returns how many."""
    written = 0
    for pixels, label in zip(batch.pixels, batch.labels, strict=True):
        name = CIFAR10_CLASSES[label]
        path = dst / batch.split / name / f"{classes.total():05}.png"
        classes[name] += 1
        if not (path.exists() and path.stat().st_size):
            with written_in(scratch, path) as file:
                Image.fromarray(pixels).save(file, "PNG")
            written += 1
    return written


def check_counts(folder: Path, classes: Counter[str]) -> None:
    """UserError unless the folder has as many files of each class as the archive, and no more."""
    for name in CIFAR10_CLASSES:
        found = sum(1 for _ in (folder / name).glob("*")) if (folder / name).is_dir() else 0
        if found != classes[name]:
            raise UserError(
                f"{folder / name} has {found:,} files where the archive has {classes[name]:,}: "
                "remove what is not from it and call again"
            )


def report(
    dst: Path, counts: dict[str, Counter[str]], written: int, origin: dict[str, Any]
) -> None:
    """Write dataset.json and print what it says."""
    totals = {split: classes.total() for split, classes in counts.items()}
    write_manifest(dst, {"dataset": "CIFAR10", "images": totals} | origin)
    lines = [
        f"train: {totals['train']:,} images, val: {totals['val']:,} images in {dst}; "
        f"{written:,} written now, {sum(totals.values()) - written:,} were there"
    ]
    if totals != COUNTS:
        lines.append("note: this is not all of CIFAR-10, which has 50,000 and 10,000 images")
    official = {version.archive: version.md5 for version in VERSIONS}.get(origin["source"])
    if official and "md5" in origin and origin["md5"] != official:
        lines.append(
            f"note: {origin['source']} is not the official archive: its md5 is {origin['md5']}, "
            f"the official one's {official}"
        )
    print("\n".join(lines), flush=True)  # noqa: T201
