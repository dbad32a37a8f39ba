"""Name the limits of the system: errors that say one become a UserError with its cure.

The system, Python, multiprocessing, torch and DALI each say it in words of their own, of which some
come from a worker process or have lost their cause on the way: hence by their texts.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT),
    *(errno.EFBIG, errno.EIO, errno.ESTALE, errno.ELOOP, errno.ETXTBSY, errno.ENOTSUP),
)
"""Errors of files that the user can correct; any other OSError is a defect."""


def has_shared_memory() -> bool:
    """Whether processes can share memory and locks."""
    return os.access(SHARED_MEMORY, os.W_OK | os.X_OK)


def check_shared_memory(otherwise: str = "") -> None:
    """Raise UserError unless processes can share memory and locks; `otherwise`: what else helps."""
    if not has_shared_memory():
        raise UserError(
            f"{SHARED_MEMORY}, where worker processes share memory, cannot be written to: mount a "
            f"tmpfs there{otherwise}"
        )


def shared_memory() -> str:
    """Say how much there is, and how to get more."""
    size = os.statvfs(SHARED_MEMORY)
    return (
        f"{SHARED_MEMORY}, {size.f_blocks * size.f_frsize / 2**20:,.0f} MiB, is too small for "
        "batches between processes: docker run --shm-size=8g or --ipc=host, or --backend dali"
    )


def allow_open_files(what: str, more: int) -> None:
    """Have this process open so many more files: as far as its user may, the limit is raised.

    Raises UserError, for `what`, where that is not enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + more
    if resource.RLIM_INFINITY in (soft, hard) or needed <= soft:
        return
    if needed > hard:
        raise UserError(
            f"{what} opens up to {needed} files, and a process may have {hard} here (ulimit -n): "
            "ulimit -n 4096 allows more"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files() -> str:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"too many open files: a process may have {most} here; ulimit -n 4096 allows more"


def processes() -> str:
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    user = "any number" if most == resource.RLIM_INFINITY else f"{most}"
    found = [f"a user may have {user} (ulimit -u)"]
    if (memory := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        found.append(f"the memory of a process is limited to {memory / 2**30:.1f} GiB (ulimit -v)")
    with suppress(OSError, StopIteration):
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition(":")[2]
        files = (Path(f"/sys/fs/cgroup/{own}/pids.max"), Path("/sys/fs/cgroup/pids.max"))
        most_here = next(file for file in files if file.exists()).read_text(encoding="utf-8")
        found.append(f"this container {most_here.strip()} (docker run --pids-limit)")
    return f"the system starts no more threads or processes: {', '.join(found)}; allow more"


LESS_MEMORY = "lower batch_size or image_size, or start fewer processes"


def memory() -> str:
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    limit = "" if most == resource.RLIM_INFINITY else f" of {most / 2**30:.1f} GiB (ulimit -v)"
    return f"the main memory{limit} is out: {LESS_MEMORY}"


def lost_worker() -> str:
    return f"a loader's worker was killed, as happens when the main memory is out: {LESS_MEMORY}"


def temporary_folder() -> str:
    return "no folder for temporary files can be written to: set TMPDIR to one"


def library() -> str:
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return memory()
    return "a library cannot be loaded: mount its folder without noexec"


def cuda_device() -> str:
    return "the CUDA device cannot be used; --device cpu runs without it"


LIMITS: tuple[tuple[str, Callable[[], str]], ...] = (
    (r"failed to map segment", library),
    (r"No usable temporary directory", temporary_folder),
    (r"Too many open files|items of ancdata", open_files),
    (
        r"shared memory(\(shm\)| object)|(out of|insufficient) shared memory|Bus error",
        shared_memory,
    ),
    (r"can't start new thread|Resource temporarily unavailable|pthread_create", processes),
    (r"[Cc]an(no|')t allocate memory|bad_alloc|MemoryError|Unable to allocate", memory),
    (r"DataLoader worker .* (exited unexpectedly|is killed by signal: Killed)", lost_worker),
    (r"CUDA-capable device\(s\) is/are busy|driver version is insufficient", cuda_device),
    (r"no kernel image is available|forward compatibility was attempted", cuda_device),
)
"""Words of errors, by regular expressions, and what is said in their place."""


def system_limit(error: BaseException) -> UserError | None:
    """Find the limit that an error, or one that led to it, speaks of."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{type(seen).__name__}: {seen}"
        for words, say in LIMITS:
            if found := re.search(f".*({words}).*", text):
                return UserError(f"{say()} ({found.group().strip()[:200]})")
        seen = seen.__cause__ or seen.__context__
    return None


def limit_of(error: BaseException) -> UserError | None:
    """Find the limit or, for an error of the disk, the file that it speaks of."""
    if limit := system_limit(error):
        return limit
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = error.filename or "a file, or the standard output"
        return UserError(f"cannot use {where}: {os.strerror(error.errno)}")
    return None


def output_is_closed() -> bool:
    """Tell whether nobody reads standard output or error any more, as in `... | head`."""
    streams = select.poll()
    for number in (1, 2):
        streams.register(number, select.POLLOUT)
    return any(events & select.POLLERR for _, events in streams.poll(0))


@contextmanager
def named_limits() -> Iterator[None]:
    """Raise a UserError in place of an error in the block that says a limit of the system."""
    try:
        yield
    except UserError:
        raise
    except BrokenPipeError as error:
        if output_is_closed():
            raise
        raise UserError(
            f"the server of the worker processes has died: {processes()}, or more memory"
        ) from error
    except Exception as error:
        if (limit := limit_of(error)) is None:
            raise
        raise limit from error
