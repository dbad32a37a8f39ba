"""`prepare scan`: find damaged and odd images before training does."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from pipelines.cli import add_rule_flags
from pipelines.datasets.images import status_of
from pipelines.datasets.rule import SplitRule
from pipelines.datasets.skip_list import skip_line
from pipelines.datasets.source import check_no_shards, find_source
from pipelines.datasets.split import (
    BY_FOLDERS,
    Split,
    check_classes,
    check_several,
    passed_over_notes,
)
from pipelines.errors import UserError
from pipelines.files import cache_folder, write_object, write_text
from pipelines.prepare.duplicates import between_splits, equal_files
from pipelines.prepare.examine import MAX_SECONDS, Examined, examine_all
from pipelines.prepare.findings import DAMAGE, NOTES, Findings, Listing, describe
from pipelines.workers import WorkerKilled, in_processes, num_cores

HEADERS, PIXELS = 128, 16
"""Files in a job, with headers and with pixels read: Ctrl-C waits until the current jobs end."""
Job = Callable[[list[str]], list[tuple[str, Examined]]]
SKIP_LIST_TITLE = "# Damaged images, found by python -m pipelines.prepare scan"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="image folder DIR/train/CLASS/*, DIR/val/CLASS/*")
    add("--decode", action="store_true", help="read every pixel, not only headers and ends")
    add("--workers", type=int, default=num_cores(), metavar="K", help="processes; default: a core")
    add("--report", type=Path, metavar="FILE", help="write all findings as JSON")
    add("--skip-list", type=Path, metavar="FILE", help="write the damaged files for training")
    add_rule_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Scan; returns 1 where something would stop training. UserError names the flag or folder."""
    check_flags(args.workers, args.report, args.skip_list)
    check_no_shards(args.folder, "prepare scan")
    root = Path(os.path.abspath(args.folder))
    listing = list_folder(root, SplitRule(val_fraction=args.val_fraction, labels=args.labels))
    cache = ScanCache(root)
    started = time.perf_counter()
    files = {
        name: found
        for name in listing.names
        if (found := cache.find(name, root, args.decode)) is not None
    }
    left = [name for name in listing.names if name not in files]
    try:
        with tqdm(total=len(left), unit="image", smoothing=0.05, disable=None) as bar:
            job, size = partial(examine_all, root, args.decode), PIXELS if args.decode else HEADERS
            for done in examine_files(job, left, args.workers, size):
                files.update(done)
                bar.update(len(done))
        seconds = time.perf_counter() - started
        equal = equal_files(root, files, args.workers)
    except BaseException:
        cache.save(cache.files | files)  # so that the next scan resumes from here
        raise
    cache.save(files)
    both, repeated = between_splits(equal, listing.split_of)
    findings = Findings(listing, files, both, repeated)
    listing.problems += findings.classes_left_empty()
    if args.report is not None:
        write_object(args.report, {"folder": str(root), **findings.to_dict()})
    if args.skip_list is not None:
        write_skip_list(args.skip_list, findings)
    print(describe(findings, len(left), seconds, args.skip_list), flush=True)  # noqa: T201
    return 1 if listing.problems or findings.damaged() else 0


def check_flags(workers: int, report: Path | None, skip_list: Path | None) -> None:
    if workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}")
    for flag, path in (("--report", report), ("--skip-list", skip_list)):
        if path is not None and path.is_dir():
            raise UserError(f"{flag} {path} is a folder: name a file")
    if skip_list is not None and skip_list.exists():
        with skip_list.open(encoding="utf-8", errors="replace") as file:
            ours = file.readline().startswith(SKIP_LIST_TITLE)
        if not ours:
            raise UserError(
                f"--skip-list {skip_list} was not written by a scan and is left as it is: "
                "name another file"
            )


def list_folder(root: Path, rule: SplitRule = BY_FOLDERS) -> Listing:
    """List the files of both splits, and what is wrong with the folders.

    Raises UserError where neither split is there.
    """
    listing = Listing()
    splits = []
    for split in ("train", "val"):
        try:
            source = find_source(root, split, rule)
        except UserError as error:
            if not root.is_dir():
                raise
            if listing.problems:
                raise UserError(listing.problems[0]) from None
            listing.problems.append(str(error))
            continue
        try:
            found = source.listing()
            chosen, note = source.select(found)
        except UserError as error:
            listing.problems.append(str(error))
            continue
        classes: dict[str, list[str]] = {name: [] for name in found.classes}
        names, labels = found.images.names_below(str(root)), found.labels.tolist()
        for i in np.flatnonzero(chosen).tolist():
            classes[found.classes[labels[i]]].append(os.fsdecode(names[i]))
        for name, files in classes.items():
            if not files:
                listing.problems.append(f"class folder {source.folder / name} has no images")
        listing.add(split, classes)
        splits.append(Split([], [], found.classes, folder=str(source.folder)))
        listing.notes += [*source.notes, note, *passed_over_notes(found.passed_over)]
    listing.notes = list(dict.fromkeys(filter(None, listing.notes)))
    try:
        for each in splits:
            check_several(each)
        if len(splits) == 2:
            check_classes(*splits)
    except UserError as error:
        listing.problems.append(str(error))
    return listing


def examine_files(
    job: Job, names: list[str], workers: int, size: int
) -> Iterator[list[tuple[str, Examined]]]:
    """Examine `size` files at a time; the results come in any order.

    A file that ends its process is a finding, too.
    """
    left = iter([names[start : start + size] for start in range(0, len(names), size)])
    under_way: dict[str, list[str]] = {}

    def handed_over() -> Iterator[list[str]]:
        for part in left:
            under_way[part[0]] = part
            yield part

    while True:
        try:
            for done in in_processes(job, handed_over(), workers):
                del under_way[done[0][0]]
                yield done
            return
        except WorkerKilled:  # by one of those under way
            for part in under_way.values():
                yield from examine_apart(job, part)
            under_way.clear()


def examine_apart(job: Job, names: list[str]) -> Iterator[list[tuple[str, Examined]]]:
    """Examine files in a process of their own; if that is killed, each file in one."""
    try:
        yield next(in_processes(job, [names], 1))
    except WorkerKilled:
        if len(names) > 1:
            for name in names:
                yield from examine_apart(job, [name])
        else:
            text = f"ends the process that decodes it, or takes it over {MAX_SECONDS} s"
            yield [(names[0], Examined(-1, -1, True, "", (("corrupt", text),)))]


def write_skip_list(path: Path, findings: Findings) -> None:
    """Write the damaged files, one a line with its kind, for `--skip-list` of training."""
    lines = [f"{skip_line(name)}  # {kind}" for name, kind in findings.damaged()]
    write_text(path, "\n".join((f"{SKIP_LIST_TITLE}; paths in its DIR", *lines)) + "\n")


VERSION = 2
FORMAT = [VERSION, PIL.__version__]
"""Another Pillow may judge otherwise."""
TYPES = [int, int, bool, str, str]
"""Types of a row without its findings."""


class ScanCache:
    """A cache of results by path; each is valid while the file keeps its size and time."""

    def __init__(self, root: Path) -> None:
        """Load the cache of a data folder; a damaged one is noted on standard error and ignored."""
        name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:20]
        self.path = cache_folder() / "scan" / f"{name}.json"
        self.files: dict[str, Examined] = {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["format"] == FORMAT:
                self.files = {path: examined(row) for path, row in stored["files"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            note(f"the scan cache {self.path} cannot be read and is made again ({error!r})")
            self.files = {}

    def find(self, path: str, root: Path, decode: bool) -> Examined | None:
        """Return the result for an unchanged file; with `decode`, only if its pixels were read."""
        found = self.files.get(path)
        if found is None or (decode and not found.decoded):
            return None
        now = status_of(root / path)
        same = now and (now.st_size, now.st_mtime_ns) == (found.size, found.mtime_ns)
        return found if same else None

    def save(self, files: dict[str, Examined]) -> None:
        """Replace the cache by these results; one that cannot be written is noted.

        Results of unreadable files are left out: permissions change neither size nor time.
        """
        kept = {
            path: file
            for path, file in files.items()
            if file.size >= 0 and not any(kind == "unreadable" for kind, _ in file.findings)
        }
        value = {"format": FORMAT, "files": kept}
        try:
            write_text(self.path, json.dumps(value, separators=(",", ":")))
        except OSError as error:
            note(f"the scan cache {self.path} cannot be written ({error.strerror})")


def examined(row: list[Any]) -> Examined:
    """Read a stored row; raises ValueError or TypeError where it is damaged."""
    size, mtime_ns, decoded, ends, findings, digest = row
    if [type(value) for value in (size, mtime_ns, decoded, ends, digest)] != TYPES:
        raise ValueError(f"not a row: {row!r:.80}")
    known = tuple((kind, text) for kind, text in findings if kind in DAMAGE or kind in NOTES)
    if len(known) != len(findings):
        raise ValueError(f"unknown findings: {findings!r:.80}")
    return Examined(size, mtime_ns, decoded, ends, known, digest)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)  # noqa: T201
