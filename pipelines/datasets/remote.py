"""Copy shards from an object store (s3://, gs://, hf://, ...) once into the user's cache.

An epoch in a random order would ask the store for every image anew; local shards serve every back
end, every epoch and every process of a node. Copies are kept under the checksum of their manifest,
which has the checksums of all files: what is in the cache has been verified.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

from pipelines.datasets.index import locked
from pipelines.datasets.shards import MAX_BYTES, NAME, Manifest, parse_manifest
from pipelines.errors import UserError
from pipelines.files import atomic_write, cache_folder, writing_to_cache

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
NUM_PARALLEL = 4
"""Files that are read at a time."""
LEAVE_SECONDS = 3.0
"""How long an interrupted command waits for the copies in flight."""
CHUNK = 8 << 20
"""Bytes of a file that are asked for and held in memory at a time."""
INSTALL = "pip install 'fastimagenet[remote]'"
CHECK = (
    "check the address and the credentials; for s3:// these are AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY (or ~/.aws), and for servers other than Amazon's AWS_ENDPOINT_URL"
)


Wanted = tuple[str, int | None, str]
"""A file that a manifest names, its bytes (None for an index, which is small) and its SHA-256."""


def is_url(text: str) -> bool:
    """Whether `text` is the URL of a remote folder, of whatever protocol."""
    return URL.match(text) is not None


def local_copy(url: str) -> Path:
    """Return the folder with a local copy of the shards below `url`, of any protocol of fsspec.

    Only what is not in the cache is read, by one process of a node while the others wait. The
    credentials are those that every tool for the protocol finds: environment, files or role.
    Raises UserError where the shards cannot be read or are damaged, or the disk is too small.
    """
    store = Store.open(url)
    data = b"".join(store.read(NAME, MAX_BYTES))
    manifest = parse_manifest(data, f"{store.url}/{NAME}")
    if not manifest.complete:
        raise UserError(f"{store.url} is not complete: upload it when prepare shard has finished")
    digest = hashlib.sha256(data).hexdigest()
    folder = cache_folder() / "shards" / digest[:20]
    names = [NAME, *(name for name, _, _ in files_of(manifest))]
    with locked(folder), writing_to_cache():
        if not all((folder / name).exists() for name in names):  # such as after a purge
            copy_files(store, folder, manifest)
            with atomic_write(folder / NAME) as temporary:
                temporary.write_bytes(data)
    return folder


@dataclass(frozen=True)
class Store:
    """A remote folder."""

    url: str
    files: Any
    """The fsspec file system."""
    root: str
    """The folder's path in it."""

    @classmethod
    def open(cls, url: str) -> Store:
        """Connect to the store. UserError where the protocol is unknown or needs a package."""
        protocol, _, path = url.partition("://")
        url = f"{protocol}://{path.rstrip('/')}"
        if not path.strip("/"):
            raise UserError(f"{url} names no bucket: expected {url}BUCKET/PREFIX")
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise UserError(f"{url} is read by fsspec: {INSTALL}") from None
        if "AWS_REGION" in os.environ:  # as all other clients of S3 but botocore read it
            os.environ.setdefault("AWS_DEFAULT_REGION", os.environ["AWS_REGION"])
        try:
            files, root = url_to_fs(url, skip_instance_cache=True)
        except ImportError as error:
            text = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"{url}: {text}; {INSTALL} brings what s3:// needs") from None
        except ValueError as error:
            raise UserError(f"{url} cannot be read ({error}): {CHECK}") from None
        return cls(url, files, root)

    def read(self, name: str, max_bytes: int) -> Iterator[bytes]:
        """Yield a file's content in chunks. UserError if it cannot be read or has more bytes."""
        with self.errors(name):
            file = self.files.open(f"{self.root}/{name}", "rb", block_size=CHUNK)
        with closing(file):
            while True:
                with self.errors(name):
                    data = file.read(CHUNK)
                if not data:
                    return
                max_bytes -= len(data)
                if max_bytes < 0:
                    raise damaged(name, "its size")
                yield data

    @contextmanager
    def errors(self, name: str) -> Iterator[None]:
        """Turn whatever a protocol's package raises into a UserError of one line."""
        try:
            yield
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{self.url}/{name} cannot be read ({text}): {CHECK}") from None


def copy_files(store: Store, folder: Path, manifest: Manifest) -> None:
    """Copy the shards that `folder` does not have, with their indexes."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_half_written(folder)  # of a process that was killed
    wanted = [file for file in files_of(manifest) if not (folder / file[0]).exists()]
    total, free = sum(size or 0 for _, size, _ in wanted), shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"{store.url} has {total / 1e9:,.1f} GB more than the {free / 1e9:,.1f} GB that are "
            f"free for {folder}: free some or set XDG_CACHE_HOME to a folder on a larger disk"
        )
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"fetching {store.url}", disable=None)
    with bar, closing(copied_files(store, folder, wanted)) as copied:
        for size in copied:
            bar.update(size)


def copied_files(store: Store, folder: Path, wanted: list[Wanted]) -> Generator[int]:
    """Copy the files, NUM_PARALLEL at a time; yield the bytes of each that is done.

    On an error, or when the caller leaves, no copy is waited for longer than seconds: a server
    that no longer answers holds up nobody. Half-written files are removed.
    """
    waiting: SimpleQueue[Wanted] = SimpleQueue()
    results: SimpleQueue[int | BaseException] = SimpleQueue()
    for file in wanted:
        waiting.put(file)
    stop = Event()

    def work() -> None:
        while not stop.is_set():
            try:
                results.put(copy_file(store, folder, stop, *waiting.get_nowait()))
            except Empty:
                return
            except BaseException as error:
                results.put(error)

    # Daemons: those of a ThreadPoolExecutor would be waited for when the process ends.
    threads = [Thread(target=work, daemon=True) for _ in range(NUM_PARALLEL)]
    try:
        for thread in threads:
            thread.start()
        for _ in wanted:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()
        until = time.monotonic() + LEAVE_SECONDS
        for thread in filter(Thread.is_alive, threads):
            thread.join(max(0.0, until - time.monotonic()))
        remove_half_written(folder)


def remove_half_written(folder: Path) -> None:
    """Remove what an interrupted copy has left; to be called under the folder's lock."""
    for path in folder.glob(".*"):
        path.unlink(missing_ok=True)


def files_of(manifest: Manifest) -> Iterator[Wanted]:
    for shard in manifest.shards():
        assert shard.sha256 is not None, "of a complete manifest"
        yield shard.file, shard.bytes, shard.sha256
        yield shard.index, None, shard.index_sha256


def copy_file(
    store: Store, folder: Path, stop: Event, name: str, size: int | None, sha256: str
) -> int:
    """Copy a file if it is what the manifest says; returns its bytes, 0 for an index.

    Raises CancelledError once `stop` is set.
    """
    digest = hashlib.sha256()
    with atomic_write(folder / name) as temporary:
        with temporary.open("wb") as target:
            for data in store.read(name, MAX_BYTES if size is None else size):
                if stop.is_set():
                    raise CancelledError
                digest.update(data)
                target.write(data)
        if digest.hexdigest() != sha256:
            raise damaged(name, "its checksum")
    return size or 0


def damaged(name: str, what: str) -> UserError:
    return UserError(f"{name} is damaged in the bucket ({what}): upload it again")
