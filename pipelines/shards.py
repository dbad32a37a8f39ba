"""Reading shards: from shards.json and the indexes to where every image lies, all of it checked.

An index has to be, to the last byte, the one that `prepare shard` writes for the names and sizes in
it, so that no entry can point outside its shard; and a shard must have the length that follows.
What the tar headers say is compared as the images are looked at, see `headers.check_file`.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.images import Images
from pipelines.index import Listing
from pipelines.shard_format import MAX_IMAGE, MAX_NAME, class_folders, index_text, layout
from pipelines.shard_manifest import AGAIN, NAME, Manifest, Shard, read_bounded, read_manifest

WORD = rb"[A-Za-z0-9_~%-]{1,155}"
ROW = re.compile(
    rb"^[A-Za-z0-9]{1,8} \d{1,19} (\d{1,10}) ((%b)/(%b\.[A-Za-z0-9]{1,8})) .*\n" % (WORD, WORD),
    re.MULTILINE,
)
"""A line of an index: what an image's size, member, class folder and base name are read from."""


def has_shards(root: Path) -> bool:
    return (root / NAME).exists()


def list_shards(root: Path, split: str) -> Listing:
    """The images of a split, in the order of the shards.

    `split` is "train" or "val". Raises UserError for a missing split and for damage.
    """
    manifest = read_manifest(root)
    folders = {name.encode(): label for label, name in enumerate(class_folders(manifest.classes))}
    shards = shards_of(root, manifest, split)
    parts = [read_index(root, shard, folders) for shard in shards]
    names = [name for rows in parts for name in rows.names]
    name_size = np.array([len(name) for name in names], np.int32)
    images = Images(
        holders=tuple(str(root / shard.file) for shard in shards),
        holder=np.repeat(np.arange(len(shards), dtype=np.int32), [s.images for s in shards]),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_start=np.cumsum(name_size, dtype=np.int64) - name_size,
        name_size=name_size,
        start=np.concatenate([layout(rows.sizes)[0] for rows in parts]),
        size=np.concatenate([rows.sizes for rows in parts]),
    )
    return Listing(images, np.concatenate([rows.labels for rows in parts]), manifest.classes)


def shard_stamps(root: Path, split: str) -> list[int]:
    """When the manifest and the split's files last changed, in ns."""
    shards = shards_of(root, read_manifest(root), split)
    files = [NAME, *(name for shard in shards for name in (shard.file, shard.index))]
    return [status_of(root / name).st_mtime_ns for name in files]


def shards_of(root: Path, manifest: Manifest, split: str) -> tuple[Shard, ...]:
    assert split in ("train", "val"), split
    if split not in manifest.splits:
        raise UserError(f"{root} has no shards of the split {split}")
    return manifest.splits[split]


def status_of(path: Path) -> os.stat_result:
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
    """What a shard holds. UserError if its index or its length is not as it should be."""
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
    found = status_of(root / shard.file).st_size
    if found != length:
        raise UserError(
            f"{root / shard.file} has {found:,} bytes, which should be {length:,}: {AGAIN}"
        )
    return rows


def parse_index(data: bytes, folders: dict[bytes, int]) -> Rows:
    """The images in an index; ValueError unless it is what `index_text` gives for them."""
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
