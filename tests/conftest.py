"""Shared fixtures: real images from `../shared` or FASTIMAGENET_SHARED, unpacked once."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.workers import num_cores
from tests.forked import preload

ROOT = Path(__file__).resolve().parent.parent
# A job in the background ignores SIGINT, and so would the commands that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Test files side by side share the cores, and no thread of theirs waits busily. torch reads this
# once, when it is imported.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // WORKERS)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that the tests read gets into the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    # What a compiler that was killed has left in the user's would fail a test. The GPU suite names
    # one for all of its processes.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))


@pytest.fixture(scope="session", autouse=True)
def workers() -> None:
    """Processes start in no time: loaders' workers, as in the commands, and whole commands."""
    preload()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with shared test data."""
    path = Path(os.environ.get("FASTIMAGENET_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no shared data at {path} (set FASTIMAGENET_SHARED)")
    return path


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder once for all processes that the tests run in: `make` fills it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path, mark = root / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not mark.exists():
                path.mkdir()
                make(path)
                mark.touch()
        return path

    return folder


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def cifar10(shared: Path, once: Once) -> Path:
    """500 training and 200 validation JPEGs of CIFAR-10, all ten classes, as an image folder."""

    def make(root: Path) -> None:
        per_class = {"train": 50, "val": 20}
        left = 10 * sum(per_class.values())
        counts: dict[Path, int] = {}
        with tarfile.open(shared / "data" / "cifar10-jpeg.tar.gz") as archive:
            for member in archive:
                path = Path(member.name)
                folder = Path(*path.parts[-3:-1])
                if not member.isfile() or counts.get(folder, 0) >= per_class[folder.parts[0]]:
                    continue
                counts[folder] = counts.get(folder, 0) + 1
                (root / folder).mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                (root / folder / path.name).write_bytes(source.read())
                left -= 1
                if not left:
                    return

    return once("cifar10", make)


@pytest.fixture(scope="session")
def photographs(shared: Path, once: Once) -> Path:
    """The 500 full-size ImageNet photographs, one class each; train and val are the same files."""

    def make(root: Path) -> None:
        with tarfile.open(shared / "data" / "imagenet-sample.tar") as archive:
            archive.extractall(root, filter="data")
        (root / "data").mkdir()
        for split in ("train", "val"):
            (root / "data" / split).symlink_to(root / "imagenet-sample", target_is_directory=True)

    return once("photographs", make) / "data"


@pytest.fixture(scope="session")
def digits() -> Path:
    """The embedded digits as an image folder in the user's cache."""
    from pipelines.datasets.digits import digits_folder

    return digits_folder()


@pytest.fixture(scope="session")
def undisturbed(cifar10: Path, once: Once) -> Path:
    """The folder of a finished run of two processes, 20 steps."""
    from tests.commands import TWO, train

    def make(root: Path) -> None:
        train("--data", cifar10, "--output", root / "run", *TWO)

    return once("undisturbed", make) / "run"


@pytest.fixture(scope="session")
def finished(cifar10: Path, once: Once) -> Path:
    """The folder of a finished run over three sizes and two batch sizes, 40 steps."""
    from tests.commands import SMALL, train

    def make(root: Path) -> None:
        train("--data", cifar10, "--output", root / "run", "--cost-per-hour", "2", *SMALL)

    return once("finished", make) / "run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB; skips where mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Use up all space of a file system."""
    with suppress(OSError), (folder / "filler").open("ab", buffering=0) as file:
        while file.write(bytes(65536)):
            pass
