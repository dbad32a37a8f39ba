"""Read WebDataset shards as `prepare shard` writes them: names, layout, index and manifest.

DIR/shards.json names DIR/train-00000.tar, ... and DIR/val-00000.tar, ..., each with DALI's index
beside it, .idx. An image is two members of a shard, CLASS/STEM.EXT and CLASS/STEM.cls, its label in
digits. All of a shard's layout follows from the names, sizes and labels of its images, so that an
index can be checked to the last byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.images import Images, Listing, open_file
from pipelines.errors import Damage, UserError
from pipelines.files import write_object

BLOCK, RECORD = 512, 10_240
"""Bytes: members are padded to blocks, an archive to records."""
MAX_FOLDER, MAX_NAME = 155, 100
"""Bytes that a plain tar header has for what is before and behind the last slash."""
MAX_IMAGE = 1 << 30
"""Most bytes of an image: the largest that is decoded takes less without compression."""
SUFFIX = re.compile(r"[A-Za-z0-9]{1,8}")
NO_SUFFIX = "img"
"""Stands for suffixes that are none."""
INDEX_VERSION = "v1.2"
HEADER = struct.Struct("100s24x12s20xc188x155s12x")
"""Of a tar member: base name, size in octal digits, type, and what comes before the base name."""


def encoded(name: str) -> str:
    """Percent-encode a file name, with dots and "~", for tar, WebDataset and DALI.

    So a key ends at the first dot, and no file has a name that begins with "~".
    """
    return quote(os.fsencode(name), safe="").replace(".", "%2E").replace("~", "%7E")


def class_folders(classes: Sequence[str]) -> list[str]:
    """Name the folder of each class in a shard: encoded, or, if too long, "~" and the label."""
    names = [encoded(name) for name in classes]
    return [name if len(name) <= MAX_FOLDER else f"~{label}" for label, name in enumerate(names)]


def member_names(folders: Sequence[str], files: Iterable[str], labels: Iterable[int]) -> list[str]:
    """Name the member of every image of a split, CLASS/STEM.EXT, after its file.

    An image whose stem is taken in its class, or too long, has "~" and its index in the split.
    """
    names = []
    taken: set[str] = set()
    for index, (file, label) in enumerate(zip(files, labels, strict=True)):
        stem, dot, suffix = file.rpartition(".")
        if not dot or suffix == "cls" or not SUFFIX.fullmatch(suffix):
            stem, suffix = file, NO_SUFFIX
        word = encoded(stem)
        key = f"{folders[label]}/{word}"
        if key in taken or len(word) + 1 + max(len(suffix), 3) > MAX_NAME:
            key = f"{folders[label]}/~{index}"
        taken.add(key)
        names.append(f"{key}.{suffix}")
    return names


def footprint(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes of images in a shard, (N,): with two headers and a block for the label."""
    return -(-sizes // BLOCK) * BLOCK + 3 * BLOCK


def layout(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return the offsets of images and of labels, (N,) each, and the bytes of the shard."""
    room = footprint(sizes)
    ends = np.cumsum(room)
    starts, label_starts = ends - room + BLOCK, ends - BLOCK
    total = int(ends[-1]) + 2 * BLOCK
    return starts, label_starts, -(-total // RECORD) * RECORD


def is_member(header: bytes, name: str, size: int) -> bool:
    """Whether a block is the tar header of a plain file of this name and size."""
    if len(header) < BLOCK:
        return False
    base, digits, kind, folder = HEADER.unpack(header)
    found = (folder.rstrip(b"\0") + b"/" if folder[0] else b"") + base.rstrip(b"\0")
    return (found, digits, kind) == (name.encode(), b"%011o\0" % size, tarfile.REGTYPE)


def index_text(names: Sequence[str], sizes: NDArray[np.int64], labels: NDArray[np.int32]) -> str:
    """Write the index of a shard as DALI's wds2idx does."""
    starts, label_starts, _ = layout(sizes)
    lines = [f"{INDEX_VERSION} {len(names)}\n"]
    rows = zip(
        names, starts.tolist(), sizes.tolist(), label_starts.tolist(), labels.tolist(), strict=True
    )
    for name, start, size, label_start, label in rows:
        key, _, suffix = name.rpartition(".")
        lines.append(
            f"{suffix} {start} {size} {name} cls {label_start} {len(str(label))} {key}.cls\n"
        )
    return "".join(lines)


NAME = "shards.json"
FORMAT = "fastimagenet shards"
VERSION = 1
SPLITS = ("train", "val")
MAX_BYTES = 32 << 20
"""Most bytes of a manifest or an index, so that reading one takes bounded memory."""
AGAIN = (
    "copy it again, or make the shards again in a new folder with python -m pipelines.prepare shard"
)
MAX_NUMBER = 1 << 50
"""Largest number in a manifest: sums of them stay far below 64 bits."""
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """A tar file and its index."""

    file: str
    """train-00000.tar and so on."""
    images: int
    bytes: int
    """Of the tar file."""
    index_sha256: str
    sha256: str | None = None
    """Of the tar file; None until it is written."""

    @property
    def index(self) -> str:
        return index_name(self.file)


@dataclass(frozen=True)
class Manifest:
    seed: int
    """Of the order of the training images."""
    shard_size: int
    """Of the image files in a shard, about, in MiB."""
    classes: tuple[str, ...]
    splits: dict[str, tuple[Shard, ...]]
    """"train", "val" or both."""
    dataset: dict[str, Any]
    """What dataset.json of the image folder said."""

    @property
    def complete(self) -> bool:
        return all(shard.sha256 for shard in self.shards())

    def shards(self) -> Iterator[Shard]:
        """Iterate over the shards of all splits."""
        return chain.from_iterable(self.splits.values())

    def with_checksums(self, sha256: dict[str, str]) -> Manifest:
        """Replace the checksums of the tar files, by file name; None for those left out."""
        splits = {
            split: tuple(replace(shard, sha256=sha256.get(shard.file)) for shard in shards)
            for split, shards in self.splits.items()
        }
        return replace(self, splits=splits)

    def plan(self) -> Manifest:
        """Leave out what is known only of finished shards, or does not change them."""
        return replace(self.with_checksums({}), dataset={})


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05}.tar"


def index_name(file: str) -> str:
    return file.removesuffix(".tar") + ".idx"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `root/shards.json`, whole or not at all."""
    about = {
        "format": FORMAT,
        "version": VERSION,
        "complete": manifest.complete,
        "images": {
            split: sum(shard.images for shard in shards)
            for split, shards in manifest.splits.items()
        },
    }
    write_object(root / NAME, about | asdict(manifest))


def read_manifest(root: Path) -> Manifest:
    """Read the manifest of a folder with finished shards.

    Raises UserError for one that is missing, damaged or of shards that are not all written.
    """
    path = root / NAME
    manifest = parse_manifest(read_bounded(path), str(path))
    if not manifest.complete:
        raise UserError(
            f"{root} is not complete: call python -m pipelines.prepare shard again to resume"
        )
    return manifest


def read_bounded(path: Path) -> bytes:
    """Read a manifest or an index. UserError if it cannot be read or is too large to be one."""
    try:
        file, status = open_file(str(path))
        with open(file, "rb") as stream:
            check_length(status.st_size, str(path))
            return stream.read(MAX_BYTES)
    except Damage as damage:
        raise UserError(f"{path} {damage}: {AGAIN}") from None


def check_length(length: int, name: str) -> None:
    if length > MAX_BYTES:
        raise UserError(f"{name} has more than {MAX_BYTES:,} bytes: {AGAIN}")


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Parse a manifest; raises UserError, with its `name`, if any field is not as it should be."""
    check_length(len(data), name)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is damaged (no JSON): {AGAIN}") from None
    try:
        found = checked(value, FIELDS, "format")
        listed = checked(found["splits"], dict.fromkeys(found["splits"], is_full_list), "splits")
        return Manifest(
            seed=found["seed"],
            shard_size=found["shard_size"],
            classes=tuple(found["classes"]),
            splits={split: shards_of(split, entries) for split, entries in listed.items()},
            dataset=value["dataset"] if isinstance(value.get("dataset"), dict) else {},
        )
    except Unexpected as field:
        raise UserError(f"{name} is damaged (its field {field}): {AGAIN}") from None


def shards_of(split: str, entries: list[Any]) -> tuple[Shard, ...]:
    """Parse the shards of a split; the names follow from the numbers, so none leads elsewhere."""
    return tuple(
        Shard(**checked(entry, SHARD_FIELDS | {"file": shard_name(split, index)}, split))
        for index, entry in enumerate(entries)
    )


class Unexpected(Exception):
    """A field that is not as it should be."""


def checked(value: Any, fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Return these fields of the JSON object `name`. Raises Unexpected, naming the wrong one.

    Each has to equal what `fields` has for it, or to pass the check there; a missing one is None.
    """
    if not isinstance(value, dict):
        raise Unexpected(name)
    found = {field: value.get(field) for field in fields}
    for field, wanted in fields.items():
        if not (wanted(found[field]) if callable(wanted) else found[field] == wanted):
            raise Unexpected(field)
    return found


def is_number_from(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= MAX_NUMBER  # True is none


def is_checksum(value: Any) -> bool:
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def is_full_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


def are_classes(value: Any) -> bool:
    """Whether these are names of visible folders, sorted, each once."""
    return is_full_list(value) and all(map(is_file_name, value)) and sorted(set(value)) == value


def is_file_name(name: Any) -> bool:
    """Whether a visible folder can have this name."""
    try:
        size = len(os.fsencode(name))
    except (UnicodeEncodeError, TypeError):
        return False
    return 0 < size <= 255 and not name.startswith(".") and "/" not in name and "\0" not in name


FIELDS = {
    "format": FORMAT,
    "version": VERSION,
    "seed": is_number_from(0),
    "shard_size": is_number_from(1),
    "classes": are_classes,
    "splits": lambda value: isinstance(value, dict) and len(value) > 0 and {*value} <= {*SPLITS},
}
SHARD_FIELDS = {
    "images": is_number_from(1),
    "bytes": is_number_from(RECORD),
    "index_sha256": is_checksum,
    "sha256": lambda value: value is None or is_checksum(value),
}


WORD = rb"[A-Za-z0-9_~%-]{1,155}"
ROW = re.compile(
    rb"^[A-Za-z0-9]{1,8} \d{1,19} (\d{1,10}) ((%b)/(%b\.[A-Za-z0-9]{1,8})) .*\n" % (WORD, WORD),
    re.MULTILINE,
)
"""A line of an index: what an image's size, member, class folder and base name are read from."""


def has_shards(root: Path) -> bool:
    return (root / NAME).exists()


def list_shards(root: Path, split: str) -> Listing:
    """List the images of a split, in the order of the shards.

    `split` is "train" or "val". Raises UserError for a missing split and for damage.
    """
    manifest = read_manifest(root)
    folders = {name.encode(): label for label, name in enumerate(class_folders(manifest.classes))}
    shards = listed_shards(root, manifest, split)
    parts = [read_index(root, shard, folders) for shard in shards]
    images = Images.packed(
        (str(root / shard.file) for shard in shards),
        (rows.names for rows in parts),
        start=np.concatenate([layout(rows.sizes)[0] for rows in parts]),
        size=np.concatenate([rows.sizes for rows in parts]),
    )
    return Listing(images, np.concatenate([rows.labels for rows in parts]), manifest.classes)


def shard_stamps(root: Path, split: str) -> list[int]:
    """Return when the manifest and the split's files last changed, in ns, and their bytes."""
    shards = listed_shards(root, read_manifest(root), split)
    files = [NAME, *(name for shard in shards for name in (shard.file, shard.index))]
    found = [checked_status(root / name) for name in files]
    return [n for each in found for n in (each.st_mtime_ns, each.st_ctime_ns, each.st_size)]


def listed_shards(root: Path, manifest: Manifest, split: str) -> tuple[Shard, ...]:
    assert split in ("train", "val"), split
    if split not in manifest.splits:
        raise UserError(f"{root} has no shards of the split {split}")
    return manifest.splits[split]


def checked_status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from None


class Rows(NamedTuple):
    """The images of a shard."""

    names: list[bytes]
    """Of the members."""
    labels: NDArray[np.int32]
    sizes: NDArray[np.int64]


def read_index(root: Path, shard: Shard, folders: dict[bytes, int]) -> Rows:
    """Read the index of a shard. UserError if it or the shard's length is not as it should be."""
    path = root / shard.index
    data = read_bounded(path)
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise UserError(f"{path} is damaged (its checksum): {AGAIN}")
    try:
        rows = parse_index(data, folders)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from None
    length = layout(rows.sizes)[2]
    if len(rows.names) != shard.images or length != shard.bytes:
        raise UserError(f"{path} is not the index of {shard.file}: {AGAIN}")
    found = checked_status(root / shard.file).st_size
    if found != length:
        raise UserError(
            f"{root / shard.file} has {found:,} bytes, which should be {length:,}: {AGAIN}"
        )
    return rows


def parse_index(data: bytes, folders: dict[bytes, int]) -> Rows:
    """Parse an index; raises ValueError unless it is what `index_text` writes for its images."""
    rows = ROW.findall(data)
    if not rows:
        raise ValueError("no image in it")
    sizes = np.array([int(size) for size, _, _, _ in rows], np.int64)
    if sizes.min() < 1 or sizes.max() > MAX_IMAGE:
        raise ValueError(f"an image of no or more than {MAX_IMAGE:,} bytes")
    if max(len(base) for _, _, _, base in rows) > MAX_NAME:
        raise ValueError("a name too long")
    try:
        labels = np.array([folders[folder] for _, _, folder, _ in rows], np.int32)
    except KeyError as error:
        raise ValueError(f"no class {error}") from None
    names = [name for _, name, _, _ in rows]
    if index_text([name.decode() for name in names], sizes, labels).encode() != data:
        raise ValueError("its entries")
    return Rows(names, labels, sizes)
