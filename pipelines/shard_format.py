"""WebDataset shards as `prepare shard` writes them: names, layout, index and manifest.

DIR/shards.json names DIR/train-00000.tar, ... and DIR/val-00000.tar, ..., each with DALI's index
beside it, .idx. An image is two members of a shard, CLASS/STEM.EXT and CLASS/STEM.cls, its label in
digits. All of a shard's layout follows from the names, sizes and labels of its images, so that an
index can be checked to the last byte.
"""

from __future__ import annotations

import os
import re
import struct
import tarfile
from collections.abc import Iterable, Sequence
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

BLOCK, RECORD = 512, 10_240
"""Bytes: members are padded to blocks, an archive to records."""
MAX_FOLDER, MAX_NAME = 155, 100
"""Bytes that a plain tar header has for what is before and behind the last slash."""
MAX_IMAGE = 1 << 30
"""Bytes of an image: more than the largest that is decoded takes without compression."""
SUFFIX = re.compile(r"[A-Za-z0-9]{1,8}")
NO_SUFFIX = "img"
"""Stands for suffixes that are none."""
INDEX_VERSION = "v1.2"
HEADER = struct.Struct("100s24x12s20xc188x155s12x")
"""Of a tar member: base name, size in octal digits, type, and what comes before the base name."""


def encoded(name: str) -> str:
    """A file name as a word for tar, WebDataset and DALI: percent-encoded, dots and "~", too.

    So a key ends at the first dot, and what "~" begins is no file's name.
    """
    return quote(os.fsencode(name), safe="").replace(".", "%2E").replace("~", "%7E")


def class_folders(classes: Sequence[str]) -> list[str]:
    """The folder of each class in a shard: its name, encoded, or "~" and its label if too long."""
    names = [encoded(name) for name in classes]
    return [name if len(name) <= MAX_FOLDER else f"~{label}" for label, name in enumerate(names)]


def member_names(folders: Sequence[str], files: Iterable[str], labels: Iterable[int]) -> list[str]:
    """CLASS/STEM.EXT of every image of a split, from the names of its files.

    An image whose stem is taken in its class, or too long, has "~" and its place in the split.
    """
    names = []
    taken: set[str] = set()
    for place, (file, label) in enumerate(zip(files, labels, strict=True)):
        stem, dot, suffix = file.rpartition(".")
        if not dot or suffix == "cls" or not SUFFIX.fullmatch(suffix):
            stem, suffix = file, NO_SUFFIX
        word = encoded(stem)
        key = f"{folders[label]}/{word}"
        if key in taken or len(word) + 1 + max(len(suffix), 3) > MAX_NAME:
            key = f"{folders[label]}/~{place}"
        taken.add(key)
        names.append(f"{key}.{suffix}")
    return names


def footprint(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes that images of these sizes take in a shard: two headers and a block for the label."""
    return -(-sizes // BLOCK) * BLOCK + 3 * BLOCK


def layout(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Where the images and their labels begin, (N,) each, and the bytes of the whole shard."""
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
    """The index of a shard, as DALI's wds2idx writes it."""
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
