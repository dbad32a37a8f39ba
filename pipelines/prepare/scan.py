"""`prepare scan DIR`: what is damaged or odd in an image folder, before training finds it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pipelines.errors import UserError
from pipelines.files import write_object, write_text
from pipelines.folder import find_split, is_folder, visible
from pipelines.prepare.duplicates import between_splits, equal_files
from pipelines.prepare.examine import MAX_SECONDS, Examined, examine_all
from pipelines.prepare.findings import Findings
from pipelines.prepare.scan_cache import ScanCache
from pipelines.prepare.scan_report import describe
from pipelines.skip_list import skip_line
from pipelines.split import Split, check_classes
from pipelines.workers import in_processes, num_cores

HEADERS, PIXELS = 128, 16
"""Files in a job, where headers are read and where pixels are: Ctrl-C waits for those in hand."""
Job = Callable[[list[str]], list[tuple[str, Examined]]]
SKIP_LIST_TITLE = "# Damaged images, found by python -m pipelines.prepare scan"


@dataclass
class Listing:
    """The files of both splits, relative to the data folder."""

    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """Folders in class folders."""
    classes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Split -> class -> names of its files."""
    problems: list[str] = field(default_factory=list)

    def split_of(self, name: str) -> str:
        return "train" if name.startswith("train" + os.sep) else "val"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="image folder DIR/train/CLASS/*, DIR/val/CLASS/*")
    add("--decode", action="store_true", help="read every pixel, not only headers and ends")
    add("--workers", type=int, default=num_cores(), metavar="K", help="processes; default: a core")
    add("--report", type=Path, metavar="FILE", help="write all findings as JSON")
    add("--skip-list", type=Path, metavar="FILE", help="write the damaged files for training")


def run(args: argparse.Namespace) -> int:
    """0, or 1 where something would stop training. Raises UserError naming the flag or folder."""
    check_flags(args)
    root = Path(os.path.abspath(args.folder))
    listing = list_folder(root)
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
        cache.save(cache.files | files)  # so that the next scan goes on from here
        raise
    cache.save(files)
    both, repeated = between_splits(equal, listing.split_of)
    decoded = args.decode or all(file.decoded for file in files.values())
    findings = Findings(files, decoded, listing.problems, listing.folders, both, repeated)
    findings.problems += classes_left_empty(listing, findings)
    if args.report is not None:
        write_object(args.report, {"folder": str(root), **findings.to_dict()})
    if args.skip_list is not None:
        write_skip_list(args.skip_list, findings)
    print(describe(findings, args, len(left), seconds), flush=True)  # noqa: T201
    return 1 if findings.problems or findings.damaged() else 0


def check_flags(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")
    for flag, path in (("--report", args.report), ("--skip-list", args.skip_list)):
        if path is not None and path.is_dir():
            raise UserError(f"{flag} {path} is a folder: name a file")
    if args.skip_list is not None and args.skip_list.exists():
        with args.skip_list.open(encoding="utf-8", errors="replace") as file:
            ours = file.readline().startswith(SKIP_LIST_TITLE)
        if not ours:
            raise UserError(
                f"--skip-list {args.skip_list} was not written by a scan and is left as it is: "
                "name another file"
            )


def list_folder(root: Path) -> Listing:
    """All files of both splits, and what is wrong with the folders.

    Raises UserError where neither split is there.
    """
    listing = Listing()
    for split in ("train", "val"):
        try:
            folder = find_split(root, split)
        except UserError as error:
            if not root.is_dir() or listing.problems:
                raise
            listing.problems.append(str(error))
            continue
        classes = list_classes(root, folder, listing.folders)
        listing.classes[split] = classes
        if not classes:
            listing.problems.append(f"{folder} has no class folders: expected {folder}/CLASS/IMAGE")
        for name, files in classes.items():
            listing.names += files
            if not files:
                listing.problems.append(f"class folder {folder / name} has no images")
    if len(listing.classes) == 2 and all(listing.classes.values()):
        try:
            check_classes(*(Split([], [], tuple(names)) for names in listing.classes.values()))
        except UserError as error:
            listing.problems.append(str(error))
    return listing


def list_classes(root: Path, folder: Path, folders: list[str]) -> dict[str, list[str]]:
    """Class -> its files, both sorted; folders within go to `folders`."""
    classes = {}
    for entry in sorted(visible(folder), key=lambda entry: entry.name):
        if not is_folder(entry):
            continue
        files: list[str] = []
        for inner in visible(entry.path):
            where = folders if is_folder(inner) else files
            where.append(os.path.relpath(inner.path, root))
        classes[entry.name] = sorted(files)
    return classes


def examine_files(
    job: Job, names: list[str], workers: int, size: int
) -> Iterator[list[tuple[str, Examined]]]:
    """The results of `size` files at a time, in any order.

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
        except UserError:  # one of those under way has ended its process
            for part in under_way.values():
                yield from examine_apart(job, part)
            under_way.clear()


def examine_apart(job: Job, names: list[str]) -> Iterator[list[tuple[str, Examined]]]:
    """Some files in a process of their own; if it is ended, each file in one."""
    try:
        yield next(in_processes(job, [names], 1))
    except UserError:
        if len(names) > 1:
            for name in names:
                yield from examine_apart(job, [name])
        else:
            text = f"ends the process that decodes it, or takes it over {MAX_SECONDS} s"
            yield [(names[0], Examined(-1, -1, True, "", (("corrupt", text),)))]


def classes_left_empty(listing: Listing, findings: Findings) -> list[str]:
    """What training with the skip list would still stop at."""
    damaged = {path for path, _ in findings.damaged()}
    return [
        f"class {name} has no image in {split} that can be read"
        for split, classes in listing.classes.items()
        for name, files in classes.items()
        if files and damaged.issuperset(files)
    ]


def write_skip_list(path: Path, findings: Findings) -> None:
    """The damaged files, one a line with its kind, as `--skip-list` of training takes it."""
    lines = [f"{skip_line(name)}  # {kind}" for name, kind in findings.damaged()]
    write_text(path, "\n".join((f"{SKIP_LIST_TITLE}; paths in its DIR", *lines)) + "\n")
