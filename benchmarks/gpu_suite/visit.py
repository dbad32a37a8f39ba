"""The GPU suite on a machine without network, from what `benchmarks.gpu_suite.pack` has packed.

    python -m benchmarks.gpu_suite.visit first --work W --output W/1 --copy OUT --limit 540
    python -m benchmarks.gpu_suite.visit second --work W --output W/2 --from tests-quick --limit 240

Unpacks a folder beside what an earlier call has unpacked in --work, then becomes the suite, which
gets all other flags. It imports nothing that may have to be unpacked first.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.cli import exit_status, make_parser, output_folder
from pipelines.errors import UserError
from pipelines.files import atomic_write

SITE, IMAGES, CIFAR10 = "site.tar.xz", "imagenet-sample.tar", "cifar10-jpeg.tar.gz"
"""Packages, and two files of the tests' data under their names there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the suite takes its place. Raises UserError for the user's mistakes."""
    example = "python -m benchmarks.gpu_suite.visit first --work W --output W/1 --copy OUT"
    about = (__doc__ or "").partition("\n")[0]
    parser = make_parser("benchmarks.gpu_suite.visit", about, example)
    parser.add_argument("carried", type=Path, metavar="DIR", help="as pack has left it")
    help_text = "a folder of this machine, the same one in all calls"
    parser.add_argument("--work", type=output_folder, required=True, metavar="DIR", help=help_text)
    args, flags = parser.parse_known_args(argv)
    work = args.work.resolve()
    unpack(args.carried, work)
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *suite_flags(work), *flags]
    paths = filter(None, (str(work / "site"), os.environ.get("PYTHONPATH")))
    os.execve(
        sys.executable,
        command,
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"),
            "FASTIMAGENET_SHARED": str(work / "shared"),
        },
    )


def unpack(carried: Path, work: Path) -> None:
    """Unpack what there is, and lay it out as image folders and as the tests' data.

    Raises UserError where there is nothing.
    """
    places = {SITE: work / "site", IMAGES: work / "images", CIFAR10: work / "cifar10"}
    found = [name for name in places if (carried / name).is_file()]
    if not found:
        raise UserError(f"{carried} has none of {', '.join(places)}")
    for name in found:
        with tarfile.open(carried / name) as archive:
            archive.extractall(places[name], filter="data")
    shared = work / "shared" / "data"
    shared.mkdir(parents=True, exist_ok=True)
    if CIFAR10 in found:
        shutil.copyfile(carried / CIFAR10, shared / CIFAR10)
    if IMAGES in found:
        (top,) = places[IMAGES].iterdir()
        (work / "data").mkdir(exist_ok=True)
        for split in ("train", "val"):
            link = work / "data" / split
            link.unlink(missing_ok=True)
            link.symlink_to(top)
        with atomic_write(shared / IMAGES) as path, tarfile.open(path, "w") as archive:
            archive.add(top, top.name)


def suite_flags(work: Path) -> list[str]:
    """Return the flags that name the image folders there are."""
    flags = ["--data", str(work / "data")] if (work / "data").is_dir() else []
    for train in (work / "cifar10").glob("*/train"):
        flags += ["--cifar10", str(train.parent)]
    return flags


if __name__ == "__main__":
    sys.exit(exit_status(main, None))
