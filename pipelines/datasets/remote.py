"""`s3://BUCKET/PREFIX`: shards copied once into the user's cache, through DALI's own S3 reader.

An epoch in a random order would ask an object store for every image anew; local shards serve every
back end, every epoch and every process of a node. Copies are kept under the checksum of their
manifest, which has those of all files: what is there has been verified.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pipelines.backends import has_dali
from pipelines.datasets.index import locked
from pipelines.datasets.shards import NAME, Manifest, parse_manifest
from pipelines.errors import UserError
from pipelines.files import atomic_write, cache_folder

SCHEME = "s3://"
PARALLEL = 4
"""Objects that are read at a time."""
MAX_BYTES = 512 << 20
"""Of the objects that are read at a time, unless one alone is larger: held in memory once."""
CHECK = (
    "check the address, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws), AWS_REGION, and "
    "for servers other than Amazon's AWS_ENDPOINT_URL"
)
REASON = re.compile(r"encountered:\s*(.*?)\s*Current pipeline object is no longer valid", re.DOTALL)


class Wanted(NamedTuple):
    """A file that a manifest names."""

    name: str
    bytes: int
    """0 for an index, which is small."""
    sha256: str


def fetched(url: str) -> Path:
    """The folder of local copies of the shards below `url`.

    Only what is not there yet is read, by one process of a node while the others wait. The
    credentials are found as by every tool for S3: environment, ~/.aws or the machine's role.
    Raises UserError where the shards cannot be read or are damaged, or the disk is too small.
    """
    place = url.removeprefix(SCHEME).strip("/")
    if not place:
        raise UserError(f"{url} names no bucket: expected {SCHEME}BUCKET/PREFIX")
    url = SCHEME + place
    if not has_dali():
        raise UserError(
            f"{url} is read by DALI: install nvidia-dali-cuda120 or nvidia-dali-cuda130, or copy "
            "the shards to a local folder"
        )
    (data,) = next(read_objects([[f"{url}/{NAME}"]]))
    manifest = parse_manifest(bytes(data), f"{url}/{NAME}")
    if not manifest.complete:
        raise UserError(f"{url} is not complete: upload it when prepare shard has finished")
    folder = cache_folder() / "shards" / hashlib.sha256(data).hexdigest()[:20]
    with locked(folder):
        if not (folder / NAME).exists():
            fetch(url, folder, manifest)
            store(folder, Wanted(NAME, 0, hashlib.sha256(data).hexdigest()), data)
    return folder


def fetch(url: str, folder: Path, manifest: Manifest) -> None:
    """Copy what `folder` does not have of the shards below `url`."""
    folder.mkdir(parents=True, exist_ok=True)
    for half_written in folder.glob(".*"):  # by a process that was killed
        half_written.unlink()
    wanted = [file for file in files_of(manifest) if not (folder / file.name).exists()]
    total, free = sum(file.bytes for file in wanted), shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"{url} has {total / 1e9:,.1f} GB more than the {free / 1e9:,.1f} GB that are free for "
            f"{folder}: free some or set XDG_CACHE_HOME to a folder on a larger disk"
        )
    groups = list(in_groups(wanted))
    contents = read_objects([[f"{url}/{file.name}" for file in group] for group in groups])
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc=f"fetching {url}", disable=None) as bar,
        ThreadPoolExecutor(PARALLEL) as pool,
    ):
        for group, found in zip(groups, contents, strict=True):
            for file in pool.map(partial(store, folder), group, found):
                bar.update(file.bytes)


def files_of(manifest: Manifest) -> Iterator[Wanted]:
    for shard in manifest.shards():
        assert shard.sha256 is not None, "of a complete manifest"
        yield Wanted(shard.file, shard.bytes, shard.sha256)
        yield Wanted(shard.index, 0, shard.index_sha256)


def in_groups(files: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """The files in runs to be read at a time."""
    group: list[Wanted] = []
    for file in files:
        size = sum(other.bytes for other in group) + file.bytes
        if group and (len(group) == PARALLEL or size > MAX_BYTES):
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def store(folder: Path, file: Wanted, content: memoryview) -> Wanted:
    """Write a file, if it is what the manifest says."""
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(f"{file.name} is damaged in the bucket (its checksum): upload it again")
    with atomic_write(folder / file.name) as beside:
        beside.write_bytes(content)
    return file


def read_objects(groups: Iterable[list[str]]) -> Iterator[list[memoryview]]:
    """The contents of objects, group after group; each list is emptied when the next is asked for.

    Raises UserError for what cannot be read.
    """
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(
        batch_size=PARALLEL, num_threads=PARALLEL, device_id=None, prefetch_queue_depth=1
    )
    with pipeline:
        paths = fn.external_source(name="paths", dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.io.file.read(paths))
    pipeline.build()
    for group in groups:
        names = [np.frombuffer(url.encode(), np.uint8) for url in group]
        try:
            (contents,) = pipeline.run(paths=names)
        except RuntimeError as error:
            reason = REASON.search(str(error))
            text = " ".join(reason[1].split()) if reason else str(error)
            raise UserError(f"{group[0]} cannot be read ({text}): {CHECK}") from None
        found = [np.asarray(contents.at(place)).data for place in range(len(group))]
        yield found
        found.clear()
        del contents  # else DALI would hold two groups at a time
