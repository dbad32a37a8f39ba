"""What the system refuses is one line that names the limit and the cure, with status 2."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase
from fastimagenet.training.failures import check_single_images, compile_advice
from pipelines import limits
from pipelines.backends import torchvision
from pipelines.backends.torchvision import decode
from pipelines.cli import exit_status
from pipelines.datasets.images import ImageFile
from pipelines.datasets.index import check_images
from pipelines.datasets.split import read_split, undecodable
from pipelines.errors import UserError
from pipelines.limits import limit_of, named_limits
from tests.commands import SMALL, error_of
from tests.test_trainer import RECIPE, SPLIT, tiny_model


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with neither HOME nor an entry, as `docker run --user 12345` has it."""

    def no_entry(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pwd.getpwuid", no_entry)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_needs_none_for_a_folder_of_images(
    cifar10: Path, tmp_path: Path
) -> None:
    assert len(read_split(cifar10, "train")) == 500
    assert "set XDG_CACHE_HOME" in error_of("--output", tmp_path / "run", "--device", "cpu")


@pytest.fixture
def few_files() -> Iterator[None]:
    """No file more than there are."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    file = os.dup(0)  # the first that is free
    os.close(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (file, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_too_many_open_files_are_no_damage_of_an_image() -> None:
    """Skipping would leave out what is as good as the rest."""
    image = ImageFile("/dev/null")
    for read in (lambda: check_images((0, [image])), lambda: decode(image)):
        with pytest.raises(UserError, match=r"too many open files: .* ulimit -n 4096"):
            with named_limits():
                read()
    with pytest.raises(OSError, match="Too many") as caught:
        image.open()
    assert "too many open files" in str(undecodable(image, caught.value))


@pytest.mark.parametrize(("hard", "allowed"), [(40, False), (900, True)])
def test_workers_need_open_files(hard: int, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shell's `ulimit -n 40` has it, and as `ulimit -S -n 40`."""
    limit = (40, hard)

    def set_limit(_: int, value: tuple[int, int]) -> None:
        nonlocal limit
        limit = value

    monkeypatch.setattr(resource, "getrlimit", lambda _: limit)
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    if allowed:
        limits.allow_open_files("the loader", 100)
        assert limit == (900, 900)
    else:
        with pytest.raises(UserError, match=r"may have 40 here \(ulimit -n\): ulimit -n 4096"):
            limits.allow_open_files("the loader", 100)


@pytest.mark.parametrize("backend", ["torchvision", "memory"])
def test_no_shared_memory_at_all(
    backend: str, cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SHARED_MEMORY", tmp_path / "shm")
    line = error_of("--data", cifar10, "--output", tmp_path / "run", *SMALL, "--backend", backend)
    assert "shm, where worker processes share memory, cannot be written to: mount" in line
    assert line.endswith(", or take --backend dali")


def test_a_small_shared_memory_is_named_before_anything_is_written(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Docker has it by default; with the size that is needed."""
    size = SimpleNamespace(f_bavail=64 << 8, f_blocks=64 << 8, f_frsize=4096)
    monkeypatch.setattr(torchvision.os, "statvfs", lambda _: size)
    flags = ("--backend", "torchvision", "--set", "phases.*.image_size=512")
    line = error_of("--data", cifar10, "--output", tmp_path / "run", *SMALL, *flags)
    assert "MiB of shared memory, and /dev/shm has 64 MiB free: docker run --shm-size=1g" in line
    assert not (tmp_path / "run").exists()


WORKER = (
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
    'last):\n  File "x.py"\nRuntimeError: unable to allocate shared memory(shm) for file '
    "</torch_1_2>: No space left on device (28)\n"
)


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (RuntimeError(WORKER), "docker run --shm-size"),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error."), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed. "), "main memory is"),
        (RuntimeError("DataLoader worker (pid(s) 9, 8) exited unexpectedly"), "lower batch_size"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (MemoryError(), "the main memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower batch_size"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "set TMPDIR"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or una"), "--device cpu"),
        (OSError(errno.EFBIG, "File too large", "a.pt"), "cannot use a.pt: File too large"),
    ],
)  # fmt: skip
def test_words_of_torch_and_the_system_become_a_limit_and_a_cure(
    error: Exception, cure: str
) -> None:
    """Also as the cause of another error."""
    with pytest.raises(UserError) as caught, named_limits():
        raise error
    assert cure in str(caught.value) and "\n" not in str(caught.value)
    if not isinstance(error, OSError) or error.filename is None:
        with pytest.raises(UserError), named_limits():
            raise ValueError("what came of it") from error


def test_a_pipe_to_a_dead_server_is_not_the_users_pipe() -> None:
    """The latter ends a command in silence, with the status of SIGPIPE."""
    with pytest.raises(UserError, match="the server of the worker processes has died"):
        with named_limits():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    read, write = os.pipe()
    kept = os.dup(2)
    os.dup2(write, 2)
    os.close(read)
    try:
        with pytest.raises(BrokenPipeError), named_limits():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(write)


def test_a_defect_stays_one() -> None:
    assert limit_of(RuntimeError("out of resource: shared memory, Required: 9")) is None
    with pytest.raises(KeyError), named_limits():
        raise KeyError("80")


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (RuntimeError("No working C++ compiler found in cpp.cxx: (None, 'g++')"), "install g++"),
        (ImportError("x.so: failed to map segment from shared object"), "TORCHINDUCTOR_CACHE_DIR"),
        (KeyError("getpwuid(): uid not found: 12345"), "TORCHINDUCTOR_CACHE_DIR"),
    ],
)
def test_what_keeps_torch_from_compiling_is_named(error: Exception, cure: str) -> None:
    with pytest.raises(UserError, match="--set compile=false runs without") as caught:
        with compile_advice():
            raise error
    assert cure in str(caught.value)
    with pytest.raises(ZeroDivisionError), compile_advice():
        raise ZeroDivisionError


def test_bn_of_a_single_value_is_named_before_the_training() -> None:
    """Two phases with batches of one image, of which the second leaves one pixel."""
    phases = (
        Phase(epochs=1, image_size=16, batch_size=1),
        Phase(epochs=1, image_size=8, batch_size=1),
    )
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(8), nn.BatchNorm2d(4))
    plan = Plan.of(RECIPE.__class__(name="test", model="smallnet", phases=phases), 1, len(SPLIT))
    with pytest.raises(UserError, match=r"phases\.1\.batch_size = 1: at 8 px .* or more"):
        check_single_images(pooled, plan.phases)
    check_single_images(tiny_model(), plan.phases)
    assert all(not parameter.is_meta for parameter in pooled.parameters())


def test_no_advice_is_a_batch_of_one() -> None:
    with pytest.raises(UserError, match="take fewer processes"):
        Plan.of(RECIPE, 40, len(SPLIT))


def test_a_closed_output_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_status(lambda _: int(sys.stdout.isatty()), []) == 0
    sys.stdout.close()
