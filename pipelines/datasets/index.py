"""Index a split: list its images and read their headers, cached so that a restart is fast.

Listing 1.3 million files and reading their headers takes a while; it is done once, by one process
of a node, and holds until a folder changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.datasets.checks import check_file
from pipelines.datasets.images import ImageFile, Images, Listing, PassedOver
from pipelines.errors import Damage, UserError
from pipelines.files import atomic_write, cache_folder
from pipelines.limits import has_shared_memory
from pipelines.workers import in_processes, num_cores

VERSION = 4
CHUNK = 512
"""Images that are checked at a time."""
MANY = 20_000
"""Number of images from which on processes pay; fewer are checked in threads."""
AT_A_TIME = 8
"""Jobs under way at least, on however few cores: it pays where the disk is slow."""
SCAN = "python -m pipelines.prepare scan"
SETTLED_SECONDS = 2.0
"""A folder that changed less than this before it was listed may change again within the same tick
of its clock: its index is not cached."""
ARRAYS = ("holder", "names", "name_start", "name_size", "start", "size")
"""Arrays of `Images` that are cached."""
Job = tuple[int, list[ImageFile]]
"""Index of the first image, and consecutive images from there on."""
Bad = list[tuple[int, str]]
"""Per bad image its index and what is wrong with it, in words that continue a sentence that begins
with the path."""
Checked = tuple[int, list[tuple[int, int, int, int]], Bad]
"""Index of the first image; (height, width, EXIF orientation, bytes) of each, zeros where it is
bad; and what is bad."""


@dataclass(frozen=True, eq=False)
class Index:
    """A listing whose files have been checked."""

    listing: Listing
    shapes: NDArray[np.int32]
    """(N, 2): height and width as the headers have them; zeros where an image is bad."""
    sizes: NDArray[np.int64]
    """(N,): bytes of the encoded image; 0 where it is bad."""
    orientations: NDArray[np.int8]
    """(N,): EXIF orientation, 1 to 8; 0 where it is bad."""
    bad: Bad
    """The images that a back end cannot read, and why."""


def index_folder() -> Path:
    """Name the folder of all indices, which may be removed at any time."""
    return cache_folder() / "index"


def cached_index(
    source: Path | str, stamps: Callable[[], list[int]], make_listing: Callable[[], Listing]
) -> Index:
    """Return the index of `source`, an absolute path, from the cache while `stamps` stay equal.

    `stamps` gives the times in ns at which all that changes with images coming or going has last
    changed, and how many entries it has. One process of a node makes the index, the others wait for
    it. Images that were bad are looked at again.
    """
    # Not the real path: an index holds the paths that it was asked for.
    name = hashlib.sha256(os.fsencode(source)).hexdigest()[:20]
    try:
        path = index_folder() / f"{name}.npz"
    except UserError:  # a user without a home
        return make_index(make_listing())
    with locked(path):
        now = stamps()
        index = load(path, now)
        if index is None:
            index = make_index(make_listing())
            if max(now, default=0) < (time.time() - SETTLED_SECONDS) * 1e9 and now == stamps():
                save(path, index, now)
            return index
    return checked_again(index)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for other processes that make the same file, where the file system has locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:  # a read-only home: each process makes its own
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems cannot
        yield
    finally:
        os.close(lock)


def make_index(listing: Listing) -> Index:
    """Check the header and the end of every file."""
    facts, bad = check_all(listing.images)
    shapes, orientations = facts[:, :2].astype(np.int32), facts[:, 2].astype(np.int8)
    return Index(listing, shapes, facts[:, 3].copy(), orientations, bad)


def check_all(images: Sequence[ImageFile]) -> tuple[NDArray[np.int64], Bad]:
    """Check the header and the end of every file.

    Returns (N, 4) heights, widths, EXIF orientations and bytes, zeros where an image is bad; and
    what is bad.
    """
    facts = np.zeros((len(images), 4), np.int64)
    bad: Bad = []
    jobs = ((start, list(images[start : start + CHUNK])) for start in range(0, len(images), CHUNK))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on large images and damaged metadata
        for start, found, damaged in run_checks(jobs, len(images)):
            facts[start : start + len(found)] = found
            bad += damaged
    return facts, sorted(bad)


def run_checks(jobs: Iterator[Job], count: int) -> Iterator[Checked]:
    """Run `check_images` on every job, with a progress bar where there are many images.

    Many are checked by processes, where the system has what these share. Raises UserError where one
    is killed.
    """
    many = count >= MANY
    run = run_in_processes if many and has_shared_memory() else run_in_threads
    hidden = None if many else True  # None: where nobody sees it
    with tqdm(total=count, unit="image", desc="checking images", disable=hidden) as bar:
        for checked in run(jobs):
            bar.update(len(checked[1]))
            yield checked


def run_in_threads(jobs: Iterator[Job]) -> Iterator[Checked]:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield from pool.map(check_images, jobs)


def run_in_processes(jobs: Iterator[Job]) -> Iterator[Checked]:
    remedy = f"{SCAN} DIR --workers 1 finds such files, to be removed"
    return in_processes(check_images, jobs, max(AT_A_TIME, num_cores()), remedy)


def check_images(job: Job) -> Checked:
    """Read the header of each image, or find what is wrong with it."""
    start, files = job
    facts: list[tuple[int, int, int, int]] = []
    bad = []
    for index, file in enumerate(files, start):
        try:
            header = check_file(file)
            facts.append((header.height, header.width, header.orientation, header.size))
        except Damage as damage:
            bad.append((index, damage.text))
            facts.append((0, 0, 0, 0))
    return start, facts, bad


def checked_again(index: Index) -> Index:
    """Check the bad images of an index again: they may have been replaced since."""
    bad: Bad = []
    for i, _ in index.bad:
        _, [(*shape, orientation, size)], damaged = check_images((i, [index.listing.images[i]]))
        index.shapes[i], index.orientations[i], index.sizes[i] = shape, orientation, size
        bad += damaged
    return replace(index, bad=bad)


def save(path: Path, index: Index, stamps: list[int]) -> None:
    """Write an index to the cache; a failure is noted on standard error."""
    listing, images = index.listing, index.listing.images
    about = {
        "version": VERSION,
        "stamps": stamps,
        "classes": listing.classes,
        "holders": images.holders,
        "passed_over": listing.passed_over,
        "bad": index.bad,
    }
    arrays = {name: getattr(images, name) for name in ARRAYS if getattr(images, name) is not None}
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                labels=listing.labels,
                shapes=index.shapes,
                sizes=index.sizes,
                orientations=index.orientations,
                **arrays,
            )
    except OSError as error:
        print(f"note: {path} cannot be written ({error.strerror})", file=sys.stderr)  # noqa: T201


def load(path: Path, stamps: list[int]) -> Index | None:
    """Read an index from the cache; None unless it is there, whole, and has these stamps."""
    try:
        with np.load(path) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["version"] != VERSION or about["stamps"] != stamps:
                return None
            kept = {name: arrays[name] for name in ARRAYS if name in arrays}
            images = Images(holders=tuple(about["holders"]), **kept)
            passed_over = PassedOver(*about["passed_over"])
            listing = Listing(images, arrays["labels"], tuple(about["classes"]), passed_over)
            bad = [(i, text) for i, text in about["bad"]]
            shapes, sizes = arrays["shapes"], arrays["sizes"]
            return Index(listing, shapes, sizes, arrays["orientations"], bad)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None  # none yet, or damaged: it is made again
