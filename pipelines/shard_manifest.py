"""`shards.json` in a folder of shards: what they hold, with checksums; written last."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pipelines.damage import Damage
from pipelines.errors import UserError
from pipelines.files import write_object
from pipelines.headers import open_file
from pipelines.shard_format import RECORD

NAME = "shards.json"
FORMAT = "fastimagenet shards"
VERSION = 1
SPLITS = ("train", "val")
MAX_BYTES = 32 << 20
"""Of a manifest or an index, so that reading one takes bounded memory."""
AGAIN = (
    "copy it again, or make the shards again in a new folder with python -m pipelines.prepare shard"
)
MAX_NUMBER = 1 << 50
"""Of any number in a manifest: sums of them stay far below 64 bits."""
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
        """Those of all splits."""
        return chain.from_iterable(self.splits.values())

    def with_checksums(self, sha256: dict[str, str]) -> Manifest:
        """The same with the checksums of the tar files, by file name; None for those left out."""
        splits = {
            split: tuple(replace(shard, sha256=sha256.get(shard.file)) for shard in shards)
            for split, shards in self.splits.items()
        }
        return replace(self, splits=splits)

    def plan(self) -> Manifest:
        """The same without what is known only of finished shards, or does not change them."""
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
    """The manifest of a folder with finished shards.

    Raises UserError for one that is missing, damaged or of shards that are not all written.
    """
    path = root / NAME
    manifest = parse_manifest(read_bounded(path), str(path))
    if not manifest.complete:
        raise UserError(
            f"{root} is not complete: call python -m pipelines.prepare shard again to go on"
        )
    return manifest


def read_bounded(path: Path) -> bytes:
    """A manifest or an index. Raises UserError if it cannot be read or is too large to be one."""
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
    """The manifest in `data`; raises UserError, which calls it `name`, for all that is none."""
    check_length(len(data), name)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is damaged (no JSON): {AGAIN}") from None
    try:
        expect(isinstance(value, dict) and value.get("format") == FORMAT, "format")
        expect(value.get("version") == VERSION, "version")
        splits = value.get("splits")
        expect(
            isinstance(splits, dict) and 0 < len(splits) and set(splits) <= set(SPLITS), "splits"
        )
        return Manifest(
            seed=whole_number(value, "seed", 0),
            shard_size=whole_number(value, "shard_size", 1),
            classes=class_names(value.get("classes")),
            splits={split: shards_of(split, listed) for split, listed in splits.items()},
            dataset=value["dataset"] if isinstance(value.get("dataset"), dict) else {},
        )
    except Unexpected as field:
        raise UserError(f"{name} is damaged (its field {field}): {AGAIN}") from None


class Unexpected(Exception):
    """A field that is not as it should be."""


def expect(holds: bool, field: str) -> None:
    if not holds:
        raise Unexpected(field)


def whole_number(value: dict[str, Any], field: str, least: int) -> int:
    found = value.get(field)
    if type(found) is not int or not least <= found <= MAX_NUMBER:  # True is none
        raise Unexpected(field)
    return found


def checksum(value: dict[str, Any], field: str) -> str:
    found = value.get(field)
    expect(isinstance(found, str) and SHA256.fullmatch(found) is not None, field)
    return str(found)


def class_names(value: Any) -> tuple[str, ...]:
    expect(isinstance(value, list) and len(value) > 0, "classes")
    expect(all(isinstance(name, str) and is_file_name(name) for name in value), "classes")
    expect(sorted(set(value)) == value, "classes")
    return tuple(value)


def is_file_name(name: str) -> bool:
    """Whether a folder can have this name and be seen."""
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return 0 < size <= 255 and not name.startswith(".") and "/" not in name and "\0" not in name


def shards_of(split: str, value: Any) -> tuple[Shard, ...]:
    """The shards of a split; their names follow from their places, so none leads elsewhere."""
    expect(isinstance(value, list) and len(value) > 0, split)
    shards = []
    for place, entry in enumerate(value):
        expect(isinstance(entry, dict), split)
        expect(entry.get("file") == shard_name(split, place), "file")
        shards.append(
            Shard(
                file=shard_name(split, place),
                images=whole_number(entry, "images", 1),
                bytes=whole_number(entry, "bytes", RECORD),
                index_sha256=checksum(entry, "index_sha256"),
                sha256=None if entry.get("sha256") is None else checksum(entry, "sha256"),
            )
        )
    return tuple(shards)
