"""`prepare cifar10`: class folders of PNGs from the python or the binary version of CIFAR-10.

The python version is pickles, and unpickling runs whatever a file names. torchvision unpickles the
official files only, by their checksums; here nothing is run, so that any file may be read: the
names that NumPy wrote into these files stand for the classes below, any other is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import pickletools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipelines.datasets.known import CIFAR10_CLASSES, CIFAR10_COUNTS
from pipelines.datasets.manifest import NAME
from pipelines.errors import UserError
from pipelines.files import atomic_write_in, scratch_folder, write_object
from pipelines.prepare import archives

SHAPE, IMAGE_BYTES = (3, 32, 32), 3 * 32 * 32


@dataclass(frozen=True)
class Version:
    """Names and checksum of the official archive of one version."""

    archive: str
    folder: str
    md5: str
    """Of the official archive, as its web page gives it."""
    suffix: str

    def files(self) -> dict[str, str]:
        """Map the names of the files to their splits, in the order of the images."""
        train = {f"data_batch_{number}{self.suffix}": "train" for number in range(1, 6)}
        return train | {f"test_batch{self.suffix}": "val"}


VERSIONS = (
    Version(
        "cifar-10-python.tar.gz", "cifar-10-batches-py", "c58f30108f718f92721af3b95e74349a", ""
    ),
    Version(
        "cifar-10-binary.tar.gz", "cifar-10-batches-bin", "c32a1d4ab5d03f1284b67883e8d87530", ".bin"
    ),
)


def read_batches(source: Path) -> Iterator[tuple[str, np.ndarray, list[int]]]:
    """Read the batches of an archive or of the folder it unpacks to, in the order of the images.

    Yields the split, pixels, (N, 32, 32, 3) uint8 RGB, and labels of each. Raises UserError for
    anything but what the official files have inside.
    """
    contents = read_files(source)
    complete = [version for version in VERSIONS if version.files().keys() <= contents.keys()]
    if not complete:
        wanted = ", ".join(VERSIONS[0].files())
        raise UserError(f"{source} is no CIFAR-10: it should have {wanted} (or these with .bin)")
    for name, split in complete[0].files().items():
        where = f"{source}: {name}"
        decode = binary_batch if complete[0].suffix else python_batch
        pixels, labels = decode(contents[name], where)
        if any(type(label) is not int or label not in range(10) for label in labels):
            raise UserError(f"{where} has labels that are not 0 to 9")
        if len(labels) != len(pixels):
            raise UserError(f"{where} has {len(pixels):,} images but {len(labels):,} labels")
        yield split, pixels.reshape(-1, *SHAPE).transpose(0, 2, 3, 1), labels


def read_files(source: Path) -> dict[str, bytes]:
    """Read all batches, 184 MB, since archives hold them in any order: name -> content."""
    wanted = {name for version in VERSIONS for name in version.files()}
    contents = {}
    if source.is_dir():
        for name in sorted(wanted & {path.name for path in source.iterdir()}):
            archives.check_small((source / name).stat().st_size, f"{source}: {name}")
            contents[name] = (source / name).read_bytes()
        return contents
    with archives.open_gzip(source) as archive:
        for member in archives.read_members(archive, source.name):
            name = Path(member.name).name
            if name in wanted:
                contents[name] = archives.read_whole(archive, source.name, member)
    return contents


def binary_batch(content: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """Split records of 1 and 3,072 bytes into labels and pixels, (N, 3072) uint8."""
    if len(content) % (1 + IMAGE_BYTES):
        raise UserError(f"{where} is no whole number of images of {1 + IMAGE_BYTES:,} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + IMAGE_BYTES)
    return records[:, 1:], records[:, 0].tolist()


def python_batch(content: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """Unpickle a dict with pixels, (N, 3072) uint8, and N labels."""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            # The unpickler allocates a memo of whatever size it is told.
            if opcode.name == "LONG_BINPUT" and (argument or 0) > len(content):
                raise pickle.UnpicklingError("a huge memo is refused")
        batch = PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = batch[b"data"].pixels, batch[b"labels"]
        if not isinstance(labels, list):
            raise TypeError("labels are no list")
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{where} is no batch of CIFAR-10 ({text})") from None
    return pixels, labels


class PlainUnpickler(pickle.Unpickler):
    """Build numbers, text, lists, dicts and `PixelArray`, and call nothing of any module."""

    def find_class(self, module: str, name: str) -> Any:
        stand_ins = {
            ("numpy.core.multiarray", "_reconstruct"): PixelArray,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): PixelType,
        }
        if (module, name) not in stand_ins:
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return stand_ins[module, name]


class PixelArray:
    """A stand-in for numpy.ndarray, made empty and then filled."""

    pixels: np.ndarray

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take (version, shape, dtype, is Fortran order, bytes), as numpy.ndarray is pickled."""
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, PixelType) or fortran or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array that is not plain bytes is refused")
        if len(shape) != 2 or shape[1] != IMAGE_BYTES:
            raise pickle.UnpicklingError(f"images of {IMAGE_BYTES:,} bytes are expected")
        self.pixels = np.frombuffer(content, np.uint8).reshape(-1, IMAGE_BYTES)


class PixelType:
    """A stand-in for numpy.dtype: uint8 only."""

    def __init__(self, code: bytes, *_: object) -> None:
        if code != b"u1":
            raise pickle.UnpicklingError(f"pixels of type {code!r} are refused")

    def __setstate__(self, state: object) -> None:
        pass  # byte order and the like: one byte has none


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = " or ".join(version.archive for version in VERSIONS)
    add("src", type=Path, metavar="SRC", help=f"{names}, or the folder that it unpacks to")
    add("dst", type=Path, metavar="DST", help="image folder to make or complete")


def run(args: argparse.Namespace) -> int:
    """Write the images; returns 0. Raises UserError naming the archive or file."""
    source = find_source(args.src)
    origin = describe(source)
    counts: dict[str, Counter[str]] = {"train": Counter(), "val": Counter()}
    written = 0
    with (
        scratch_folder(args.dst) as scratch,
        tqdm(total=sum(CIFAR10_COUNTS.values()), unit="image", disable=None) as bar,
    ):
        for split, pixels, labels in read_batches(source):
            written += write_batch(pixels, labels, args.dst / split, counts[split], scratch)
            bar.update(len(labels))
    for split, classes in counts.items():
        archives.check_counts(args.dst / split, classes)
    report(args.dst, counts, written, origin)
    return 0


def find_source(src: Path) -> Path:
    """Return SRC, or the archive or unpacked archive in it."""
    if not src.exists():
        raise UserError(f"no file or folder {src}: name cifar-10-python.tar.gz or its folder")
    for version in VERSIONS:
        for path in (src / version.folder, src / version.archive):
            if path.exists():
                return path
    return src


def describe(source: Path) -> dict[str, Any]:
    """Say where the images are from, for dataset.json."""
    origin: dict[str, Any] = {"source": source.name}
    if source.is_file():
        with source.open("rb") as file:
            origin["md5"] = hashlib.file_digest(file, "md5").hexdigest()
        origin["bytes"] = source.stat().st_size
    return origin


def write_batch(
    batch: np.ndarray, labels: list[int], folder: Path, classes: Counter[str], scratch: Path
) -> int:
    """Write the missing images and count all in `classes`; returns how many were written."""
    written = 0
    for pixels, label in zip(batch, labels, strict=True):
        name = CIFAR10_CLASSES[label]
        path = folder / name / f"{classes.total():05}.png"
        classes[name] += 1
        if not (path.exists() and path.stat().st_size):
            with atomic_write_in(scratch, path) as file:
                Image.fromarray(pixels).save(file, "PNG")
            written += 1
    return written


def report(
    dst: Path, counts: dict[str, Counter[str]], written: int, origin: dict[str, Any]
) -> None:
    """Write dataset.json and print a summary."""
    totals = {split: classes.total() for split, classes in counts.items()}
    write_object(dst / NAME, {"dataset": "CIFAR10", "images": totals} | origin)
    lines = [
        f"train: {totals['train']:,} images, val: {totals['val']:,} images in {dst}; "
        f"{written:,} written now, {sum(totals.values()) - written:,} were there"
    ]
    if totals != CIFAR10_COUNTS:
        lines.append("note: this is not all of CIFAR-10, which has 50,000 and 10,000 images")
    official = {version.archive: version.md5 for version in VERSIONS}.get(origin["source"])
    if official and "md5" in origin and origin["md5"] != official:
        lines.append(
            f"note: {origin['source']} is not the official archive: its md5 is {origin['md5']}, "
            f"the official one's {official}"
        )
    print("\n".join(lines), flush=True)  # noqa: T201
