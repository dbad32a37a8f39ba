"""The kinds of findings, and what a scan found as a whole."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import PIL
from tqdm import tqdm

from pipelines.datasets.folders import find_split, is_folder, visible
from pipelines.datasets.split import Split, check_classes, skip_line
from pipelines.errors import UserError
from pipelines.files import cache_folder, write_object, write_text
from pipelines.prepare.examine import (
    MAX_SECONDS,
    Duplicates,
    Examined,
    between_splits,
    equal_files,
    examine_all,
)
from pipelines.workers import in_processes, num_cores

DAMAGE = {
    "empty": "no bytes",
    "truncated": "the end is missing",
    "junk": "no image at all",
    "format": "an image that not every back end reads: convert it",
    "corrupt": "cannot be decoded",
    "too-large": "more pixels than Pillow decodes",
    "too-thin": "no memory would hold it once its short side is enlarged",
    "unreadable": "no permission, or a link that leads nowhere",
    "not-a-file": "a FIFO, socket or device",
}
"""Kinds that would stop training, on one back end at least: these go to the skip list."""
NOTES = {
    "wrong-suffix": "the name says another format: read all the same",
    "animated": "only the first of several frames is read",
    "16-bit": "more than 8 bits a sample: greyscale ones look different to each back end",
    "cmyk": "the colour profile is not applied",
    "greyscale": "all channels will be equal",
    "palette": "converted to RGB",
    "alpha": "transparency is dropped",
    "exif-rotated": "EXIF orientation is not applied",
    "large": "slow, and takes much memory",
    "thin": "little is left of it after a crop",
    "tiny": "less than 8 pixels high or wide",
    "name": "no UTF-8",
    "folder": "a folder in a class folder: what it holds is not read",
}
"""Kinds that every back end reads."""


@dataclass
class Findings:
    """What a scan found; paths are relative to the data folder."""

    examined: dict[str, Examined]
    decoded: bool
    problems: list[str] = field(default_factory=list)
    """What is wrong with the folders: training stops at these."""
    folders: list[str] = field(default_factory=list)
    """Folders in class folders."""
    duplicates: list[Duplicates] = field(default_factory=list)
    repeated: dict[str, int] = field(default_factory=dict)
    """Per split, images that are there more than once, not counting the first."""

    def by_kind(self) -> dict[str, list[tuple[str, str]]]:
        """Kind -> (path, detail) of all files of that kind, damage first."""
        found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in (*DAMAGE, *NOTES)}
        for path, file in self.examined.items():
            for kind, text in file.findings:
                found[kind].append((path, text))
        found["folder"] += [(path, "is a folder") for path in self.folders]
        return {kind: sorted(files) for kind, files in found.items() if files}

    def damaged(self) -> list[tuple[str, str]]:
        """(path, kind) of what the skip list names, sorted."""
        return sorted(
            (path, kind)
            for path, file in self.examined.items()
            for kind, _ in file.findings
            if kind in DAMAGE
        )

    def to_dict(self) -> dict[str, Any]:
        """The report, for JSON."""
        by_kind = self.by_kind()
        counts = Counter({kind: len(files) for kind, files in by_kind.items()})
        return {
            "images": len(self.examined),
            "decoded": self.decoded,
            "counts": dict(counts),
            "problems": self.problems,
            "findings": [
                {
                    "path": path,
                    "kind": kind,
                    "severity": "damage" if kind in DAMAGE else "note",
                    "detail": text,
                }
                for kind, files in by_kind.items()
                for path, text in files
            ],
            "duplicates_between_splits": [
                {"train": train, "val": val} for train, val in self.duplicates
            ],
            "duplicates_within_splits": self.repeated,
        }


SHOWN = 3
"""Paths that stand for a kind."""


def describe(findings: Findings, args: argparse.Namespace, num_read: int, seconds: float) -> str:
    """The findings as text: damage, notes, duplicates, problems and what to do."""
    number = len(findings.examined)
    rate = f", {num_read / seconds:,.0f} images/s" if num_read else ""
    what = "all pixels" if findings.decoded else "headers and ends; --decode reads the pixels too"
    lines = [
        f"{number:,} images, {num_read:,} of them read in {seconds:.1f} s{rate} "
        f"({number - num_read:,} unchanged since an earlier scan); {what}"
    ]
    by_kind = findings.by_kind()
    for title, kinds in (("damage, would stop training:", DAMAGE), ("notes:", NOTES)):
        found = {kind: by_kind[kind] for kind in kinds if kind in by_kind}
        if found:
            lines.append(title)
        for kind, files in found.items():
            lines += kind_lines(kind, kinds[kind], files)
    lines += duplicate_lines(findings)
    if findings.problems:
        lines += ["problems, would stop training:", *(f"  {text}" for text in findings.problems)]
    lines.append(advice(findings, args))
    return printable("\n".join(lines))


def kind_lines(kind: str, meaning: str, files: list[tuple[str, str]]) -> list[str]:
    """A line on the kind, then some of its files."""
    lines = [f"  {kind:<12} {len(files):>8,}  {meaning}"]
    lines += [f"      {shown(path)} {text}".rstrip() for path, text in files[:SHOWN]]
    return lines + more(len(files))


def duplicate_lines(findings: Findings) -> list[str]:
    lines = []
    if findings.duplicates:
        images = sum(len(val) for _, val in findings.duplicates)
        lines.append(f"duplicates: {images:,} images of validation are in training as well")
        for train, val in findings.duplicates[:SHOWN]:
            lines.append(f"      {shown(val[0])} = {shown(train[0])}")
        lines += more(len(findings.duplicates))
    if findings.repeated:
        parts = [f"{number:,} in {split}" for split, number in findings.repeated.items()]
        lines.append(f"duplicates within a split: {', '.join(parts)}")
    return lines


def more(number: int) -> list[str]:
    return [f"      and {number - SHOWN:,} more"] if number > SHOWN else []


def shown(path: str) -> str:
    """A path on one line of a bearable length."""
    path = path if path.isprintable() else ascii(path)[1:-1]
    return path if len(path) <= 120 else f"{path[:70]}...{path[-45:]}"


def printable(text: str) -> str:
    """Without what no terminal takes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def advice(findings: Findings, args: argparse.Namespace) -> str:
    """The last line: what to do now."""
    number = len(findings.damaged())
    if not number:
        return "training stops at the problems above" if findings.problems else "nothing is damaged"
    files = "1 damaged file" if number == 1 else f"{number:,} damaged files"
    if args.skip_list is not None:
        return f"{files}: leave them out with --skip-list {shlex.quote(str(args.skip_list))}"
    return f"{files}: --skip-list FILE writes the list that training takes"


VERSION = 1
FORMAT = [VERSION, PIL.__version__]
"""Another Pillow may judge otherwise."""
TYPES = [int, int, bool, str, str]
"""Of a row without its findings."""


class ScanCache:
    """Results by path below one data folder; valid for the size and time that the file had."""

    def __init__(self, root: Path) -> None:
        """Load what there is; a damaged cache is left aside with a note on standard error."""
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
            note(f"the scan cache {self.path} cannot be read and is made anew ({error!r})")
            self.files = {}

    def find(self, path: str, root: Path, decode: bool) -> Examined | None:
        """The result for a file that is as it was; one of the header only is none for `decode`."""
        found = self.files.get(path)
        if found is None or (decode and not found.decoded):
            return None
        try:
            status = os.stat(root / path)
        except OSError:
            return None
        same = (status.st_size, status.st_mtime_ns) == (found.size, found.mtime_ns)
        return found if same else None

    def save(self, files: dict[str, Examined]) -> None:
        """Keep these results in place of all older ones; a cache that cannot be written is noted.

        What could not be read is not kept: permissions change without a trace in size and time.
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
    """One stored row; raises ValueError or TypeError where it is damaged."""
    size, mtime_ns, decoded, ends, findings, digest = row
    if [type(value) for value in (size, mtime_ns, decoded, ends, digest)] != TYPES:
        raise ValueError(f"not a row: {row!r:.80}")
    known = tuple((kind, text) for kind, text in findings if kind in DAMAGE or kind in NOTES)
    if len(known) != len(findings):
        raise ValueError(f"unknown findings: {findings!r:.80}")
    return Examined(size, mtime_ns, decoded, ends, known, digest)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)  # noqa: T201


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
