"""`prepare shard`: WebDataset shards of an image folder, planned from names and sizes alone."""

from __future__ import annotations

import argparse
import hashlib
import os
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.cli import add_rule_flags, check_seed
from pipelines.datasets import shards
from pipelines.datasets.folders import SPLIT_FOLDERS, find_split, visible
from pipelines.datasets.images import changed_ns, open_file, unreadable
from pipelines.datasets.manifest import known_facts
from pipelines.datasets.rule import SplitRule
from pipelines.datasets.shards import Manifest, Shard
from pipelines.datasets.source import check_no_shards
from pipelines.datasets.split import ON_BAD_IMAGE, Split, check_classes, notes_of, read_split
from pipelines.errors import Damage, UserError
from pipelines.files import atomic_write_in, scratch_folder
from pipelines.sampling import Stream
from pipelines.workers import in_processes, num_cores


@dataclass(frozen=True, eq=False)
class Plan:
    """What a shard will hold, in order."""

    file: str
    """train-00000.tar and so on."""
    paths: list[str]
    """Of the image files."""
    names: list[str]
    """Of the members."""
    sizes: NDArray[np.int64]
    labels: NDArray[np.int32]
    sha256: str | None = None
    """Of the tar file, if an earlier call has written it."""

    def index(self) -> bytes:
        return shards.index_text(self.names, self.sizes, self.labels).encode("ascii")


@dataclass(frozen=True)
class Packed:
    """A finished shard."""

    file: str
    sha256: str
    written: bool
    """False: an earlier call has."""


def pack(dst: Path, scratch: Path, plan: Plan) -> Packed:
    """Write a shard and its index to `dst`, unless they are there already.

    Raises UserError for an image file that is not what was planned, OSError for a full disk.
    """
    path = dst / plan.file
    found = checksum_if_whole(path, plan)
    if found is not None and found == (plan.sha256 or found):
        return Packed(plan.file, found, written=False)
    with atomic_write_in(scratch, path) as file:
        write_tar(file, plan)
        file.flush()
        os.fsync(file.fileno())
        written = checksum(Path(file.name))
    with atomic_write_in(scratch, path.with_name(shards.index_name(plan.file))) as file:
        file.write(plan.index())
    return Packed(plan.file, written, written=True)


def checksum_if_whole(path: Path, plan: Plan) -> str | None:
    """Return the SHA-256 of a shard that was written before from the same files, otherwise None.

    The index, which is written last, must be the planned one, and no image newer than the shard.
    """
    try:
        status = path.stat()
        if path.with_name(shards.index_name(plan.file)).read_bytes() != plan.index():
            return None
        newest = max(map(changed_ns, map(os.stat, plan.paths)))
    except FileNotFoundError:
        return None
    if status.st_size != shards.layout(plan.sizes)[2] or status.st_mtime_ns < newest:
        return None
    return checksum(path)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tar(file: BinaryIO, plan: Plan) -> None:
    """Write all members; equal plans and images give equal bytes."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, name, size, label in zip(
            plan.paths, plan.names, plan.sizes.tolist(), plan.labels.tolist(), strict=True
        ):
            image, found = open_image(path)
            with image:
                if found != size:
                    raise UserError(f"{path} has changed since it was looked at: call again")
                tar.addfile(member_info(name, size), image)
            digits = str(label).encode()
            tar.addfile(member_info(f"{name.rpartition('.')[0]}.cls", len(digits)), BytesIO(digits))


def open_image(path: str) -> tuple[BinaryIO, int]:
    """Open an image file; returns its size in bytes, too."""
    try:
        file, status = open_file(path)
    except Damage as damage:
        raise UserError(f"{path} {damage}: it has changed since it was looked at") from None
    return open(file, "rb"), status.st_size


def member_info(name: str, size: int) -> tarfile.TarInfo:
    """Describe a plain file without owner and time."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info


CHUNK = 512
"""Files whose sizes a thread reads at a time."""
MAX_SHARD_SIZE = 1024
"""MiB; a copy from an object store is resumed shard by shard."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("src", type=Path, metavar="SRC", help="image folder: SRC/train and SRC/val (or SRC/test)")
    add("dst", type=Path, metavar="DST", help="gets shards.json, train-00000.tar, .idx and so on")
    add(
        "--shard-size",
        type=int,
        default=128,
        metavar="MIB",
        help="size of a shard, about; default 128",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the training images' order; default 0")
    add("--skip-list", type=Path, metavar="FILE", help="names images to leave out, one a line")
    add_rule_flags(parser)
    add("--on-bad-image", choices=ON_BAD_IMAGE, default="error", help="default: error")
    add("--workers", type=int, default=num_cores(), metavar="K", help="processes; default: a core")


def run(args: argparse.Namespace) -> int:
    """Write the missing shards; returns 0. Raises UserError naming the flag, folder or file."""
    started = time.perf_counter()
    check_flags(args)
    check_no_shards(args.src, "prepare shard")
    earlier = earlier_manifest(args.dst, args.seed, args.shard_size)
    rule = SplitRule(val_fraction=args.val_fraction, labels=args.labels)
    splits = read_splits(args.src, args.skip_list, args.on_bad_image, rule)
    plans = {
        name: list(plan_split(name, split, args.seed, args.shard_size << 20))
        for name, split in splits.items()
    }
    manifest = Manifest(
        seed=args.seed,
        shard_size=args.shard_size,
        classes=next(iter(splits.values())).classes,
        splits={name: tuple(map(planned, listed)) for name, listed in plans.items()},
        dataset=known_facts(args.src),
    )
    if earlier is not None and earlier.plan() != manifest.plan():
        raise UserError(f"{args.dst} holds shards of other images: name another DST or remove it")
    known = {shard.file: shard.sha256 for shard in (earlier or manifest).shards()}
    jobs = [replace(plan, sha256=known[plan.file]) for listed in plans.values() for plan in listed]
    with scratch_folder(args.dst) as scratch:
        if earlier is None:
            shards.write_manifest(args.dst, manifest)
        packed = pack_all(args.dst, scratch, jobs, args.workers)
        manifest = manifest.with_checksums({file: shard.sha256 for file, shard in packed.items()})
        shards.write_manifest(args.dst, manifest)
    report(args.dst, splits, manifest, packed, time.perf_counter() - started)
    return 0


def check_flags(args: argparse.Namespace) -> None:
    if not 1 <= args.shard_size <= MAX_SHARD_SIZE:
        raise UserError(
            f"--shard-size must be from 1 to {MAX_SHARD_SIZE} MiB, not {args.shard_size}"
        )
    check_seed(args.seed)
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")
    if args.dst.resolve().is_relative_to(args.src.resolve()):
        raise UserError(f"{args.dst} lies in {args.src} itself: name another DST")


def earlier_manifest(dst: Path, seed: int, shard_size: int) -> Manifest | None:
    """Read the manifest of an earlier call. UserError if it had other flags, or DST is no such."""
    if not dst.exists() or not visible(dst):
        return None
    if not (dst / shards.NAME).exists():
        raise UserError(f"{dst} is not empty and has no {shards.NAME}: name a new folder for DST")
    found = shards.parse_manifest(shards.read_bounded(dst / shards.NAME), str(dst / shards.NAME))
    for flag, was, asked in (
        ("--seed", found.seed, seed),
        ("--shard-size", found.shard_size, shard_size),
    ):
        if was != asked:
            raise UserError(
                f"{flag}: {dst} was made with {was}, not {asked}: name another DST or remove it"
            )
    return found


def read_splits(
    src: Path, skip_list: Path | None, on_bad_image: str, rule: SplitRule
) -> dict[str, Split]:
    """Read the splits that `src` has: "train", "val" or both, as by a rule."""
    splits = {}
    for name, folders in SPLIT_FOLDERS.items():
        if rule.given or any((src / folder).is_dir() for folder in folders):
            splits[name] = read_split(src, name, skip_list, on_bad_image=on_bad_image, rule=rule)
    if not splits:
        find_split(src, "train")  # which says what is there instead
    if len(splits) == 2:
        check_classes(splits["train"], splits["val"])
    return splits


def plan_split(name: str, split: Split, seed: int, shard_bytes: int) -> Iterator[Plan]:
    """Plan the shards of a split: training images are shuffled, the others keep their order."""
    paths = [file.path for file in split.files]
    sizes, labels = file_sizes(paths), np.asarray(split.labels, np.int32)
    names = shards.member_names(
        shards.class_folders(split.classes), names_in_class(split), labels.tolist()
    )
    order = np.arange(len(split))
    if name == "train":
        order = Stream.SHARD_SHUFFLE.generator(seed).permutation(len(split))
    room = shards.footprint(sizes[order])
    total = int(room.sum())
    share = -(-total // -(-total // shard_bytes))  # of the fewest that it takes
    shard = (np.cumsum(room) - room) // share
    for number, indices in enumerate(np.split(order, np.flatnonzero(np.diff(shard)) + 1)):
        yield Plan(
            file=shards.shard_name(name, number),
            paths=[paths[i] for i in indices.tolist()],
            names=[names[i] for i in indices.tolist()],
            sizes=sizes[indices],
            labels=labels[indices],
        )


def names_in_class(split: Split) -> Iterator[str]:
    """Yield the path of each image below its class folder."""
    labels = np.asarray(split.labels).tolist()
    for name, label in zip(split.names(), labels, strict=True):
        yield os.fsdecode(name).removeprefix(f"{split.classes[label]}/")


def file_sizes(paths: list[str]) -> NDArray[np.int64]:
    """Return the bytes of each file, (N,). UserError for one that is larger than any image."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    with ThreadPoolExecutor(8) as pool:  # pays where the disk is slow
        sizes = np.concatenate(list(pool.map(sizes_of, chunks)))
    largest = int(sizes.argmax())
    if sizes[largest] > shards.MAX_IMAGE:
        raise UserError(
            f"{paths[largest]} has {sizes[largest]:,} bytes, more than {shards.MAX_IMAGE:,}: "
            "remove it or name it in --skip-list"
        )
    return sizes


def sizes_of(paths: list[str]) -> NDArray[np.int64]:
    sizes = []
    for path in paths:
        try:
            sizes.append(os.stat(path).st_size)
        except OSError as error:
            raise UserError(f"{path} {unreadable(error)}: call again") from None
    return np.array(sizes, np.int64)


def planned(plan: Plan) -> Shard:
    """Make the manifest's entry of a shard before it is written."""
    index = plan.index()
    if len(index) > shards.MAX_BYTES:
        raise UserError(
            f"--shard-size: the index of {plan.file} would have {len(index):,} bytes, more than "
            f"{shards.MAX_BYTES:,}: take a smaller size"
        )
    size = shards.layout(plan.sizes)[2]
    return Shard(plan.file, len(plan.paths), size, hashlib.sha256(index).hexdigest())


def pack_all(dst: Path, scratch: Path, plans: list[Plan], workers: int) -> dict[str, Packed]:
    """Pack all shards in processes; returns them by file name."""
    sizes = {plan.file: int(shards.footprint(plan.sizes).sum()) for plan in plans}
    packed = {}
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, smoothing=0.05, disable=None) as bar:
        for done in in_processes(partial(pack, dst, scratch), plans, workers):
            packed[done.file] = done
            bar.update(sizes[done.file])
    return packed


def report(
    dst: Path,
    splits: dict[str, Split],
    manifest: Manifest,
    packed: dict[str, Packed],
    seconds: float,
) -> None:
    """Print a summary."""
    written = sum(shard.written for shard in packed.values())
    lines = notes_of(*splits.values())
    for name, split in splits.items():
        tars = manifest.splits[name]
        size = sum(tar.bytes for tar in tars) / 1e6
        files = "1 tar file" if len(tars) == 1 else f"{len(tars):,} tar files"
        lines.append(f"{name}: {len(split):,} images, {files}, {size:,.1f} MB")
    lines.append(
        f"{dst}: {written:,} written, {len(packed) - written:,} were there, {seconds:,.1f} s"
    )
    print("\n".join(lines), flush=True)  # noqa: T201
