"""Packs what a GPU machine without network needs beside the repository, in two folders to carry.

    python -m benchmarks.gpu_suite.pack --shared DIR --architecture 90 --output DIR

`first` holds DALI, slim, and photographs, `second` more of them and CIFAR-10, for
`benchmarks.gpu_suite.visit`. Slim: one Python's extension modules, no symbols, no library that
decoding JPEGs does without and, with --architecture, code for that GPU alone: whether a driver
takes libraries whose other code is blanked is not yet known. Compressing takes minutes.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.common.measuring import command_parser
from benchmarks.gpu_suite.fatbin import blanked
from benchmarks.gpu_suite.visit import CIFAR10, IMAGES, SITE
from pipelines.cli import at_least, exit_status, output_folder
from pipelines.errors import UserError
from pipelines.files import atomic_write

WHEELS = (
    *("nvidia-dali-cuda130==2.4.0", "nvidia-nvimgcodec-cu13>=0.9,<0.10", "nvidia-nvjpeg"),
    *("astunparse", "gast", "six", "optree", "tomli-w"),
)
"""What the suite needs beside torch, torchvision, Pillow, Matplotlib, Jinja2, tqdm and pytest."""
GLIBC = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_26", "2_17")
"""pip takes a wheel for exactly the platforms that it is told."""
NEEDLESS = re.compile(
    r"(^|/)(include|bin|pkgconfig|__pycache__)(/|$)|\.(pyi|h|a)$|Acknowledgements"
    r"|(^|/)nvidia/(libnvcomp|nvjpeg2k|nvtiff)(/|$)|lib(nvtiff|nvjpeg2k|tiff)_ext"
    r"|nvimgcodec/tools/|nvimgcodec_impl|_tf_plugin|dali/plugin/(tf|jax|paddle|mxnet)"
)
"""Paths in the wheels: what is built against, other formats, other frameworks."""
EXTENSION = re.compile(r"\.cpython-(\d+)-")
XZ = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20},
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    help_text = f"the tests' data, $FASTIMAGENET_SHARED: DIR/data/{IMAGES} and {CIFAR10}"
    add("--shared", type=Path, required=True, metavar="DIR", help=help_text)
    add("--output", type=output_folder, required=True, metavar="DIR")
    add("--python", default="3.12", metavar="X.Y", help="that of the machine; default 3.12")
    help_text = "compute capability without its dot, 90 for a Hopper; default: code for all stays"
    add("--architecture", type=at_least(50), metavar="SM", help=help_text)
    help_text = "images in the first and in the second folder; default 100 350"
    add("--photographs", type=at_least(1), nargs=2, default=(100, 350), metavar="N", help=help_text)
    args = parser.parse_args(argv)
    data, first, second = args.shared / "data", args.output / "first", args.output / "second"
    for name in (IMAGES, CIFAR10):
        if not (data / name).is_file():
            raise UserError(f"--shared {args.shared} has no data/{name}")
    if shutil.which("strip") is None:
        raise UserError("strip is not installed: it is in the package binutils")
    for folder in (first, second):
        folder.mkdir(parents=True, exist_ok=True)
    divide(data / IMAGES, [first / IMAGES, second / IMAGES], args.photographs)
    shutil.copyfile(data / CIFAR10, second / CIFAR10)
    with tempfile.TemporaryDirectory() as work:
        download(args.python, Path(work) / "wheels")
        unpack((Path(work) / "wheels").glob("*.whl"), Path(work) / "site")
        slim(Path(work) / "site", args.python.replace(".", ""), args.architecture)
        compress(Path(work) / "site", first / SITE)
    for path in sorted(args.output.glob("*/*")):
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path}")
    return 0


def divide(archive: Path, parts: Sequence[Path], counts: Sequence[int]) -> None:
    """Write two archives of so many files of another one: the first ones at equal distances, then
    those that are left, in their order. Raises UserError where there are fewer."""
    with tarfile.open(archive) as source:
        files = sorted((one for one in source if one.isfile()), key=lambda one: one.name)
        if len(files) < sum(counts):
            raise UserError(f"--photographs: {archive} has {len(files)}, not {sum(counts)}")
        first = files[:: len(files) // counts[0]][: counts[0]]
        others = [one for one in files if one not in first]
        for path, chosen in zip(parts, (first, others[: counts[1]]), strict=True):
            with atomic_write(path) as temporary, tarfile.open(temporary, "w") as target:
                for one in chosen:
                    target.addfile(one, source.extractfile(one))


def download(python: str, folder: Path) -> None:
    """Get the wheels for that Python on Linux from the package index. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for name in (*(f"manylinux_{version}" for version in GLIBC), "manylinux2014"):
        command += ["--platform", f"{name}_x86_64"]
    done = subprocess.run([*command, *WHEELS], capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"pip download has failed: {told}")


def unpack(wheels: Iterable[Path], site: Path) -> None:
    """Unpack wheels as an installation does that compiles nothing."""
    for wheel in sorted(wheels):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def slim(site: Path, python: str, architecture: int | None) -> None:
    """Remove and shorten in place what is not needed there; `python`: "312"."""
    for path in sorted(site.rglob("*")):
        if not path.is_file():
            continue
        extension = EXTENSION.search(path.name)
        if NEEDLESS.search(path.relative_to(site).as_posix()) or (
            extension and extension[1] != python
        ):
            path.unlink()
        elif ".so" in path.suffixes:
            if architecture is not None:
                path.write_bytes(blanked(path.read_bytes(), architecture))
            # What it does not understand it leaves as it is.
            subprocess.run(["strip", "--strip-unneeded", path], capture_output=True, check=False)


def compress(folder: Path, archive: Path) -> None:
    """Write the folder's files as .tar.xz, the same bytes from the same files."""
    with (
        atomic_write(archive) as temporary,
        lzma.open(temporary, "wb", filters=XZ) as file,
        tarfile.open(fileobj=file, mode="w|") as target,
    ):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            about = target.gettarinfo(path, path.relative_to(folder).as_posix())
            about.uid = about.gid = about.mtime = 0
            about.uname = about.gname = ""
            with path.open("rb") as content:
                target.addfile(about, content)


if __name__ == "__main__":
    sys.exit(exit_status(main, None))
