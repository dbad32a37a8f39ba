"""What a container may use: the CPU quota and memory limit of this process's control group.

Both versions of Linux's cgroups are read, as docs.kernel.org has them under admin-guide: the
process's group, and those above it as far as the mount shows them; the tightest limit holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
"""Where proc and sys are."""
V2 = "cgroup2"


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many cores' time the process gets, such as 1.5; None without a quota."""
    quotas = []
    for group in groups("cpu", root):
        v1 = [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
        quota = _words(group / "cpu.max") or v1
        if len(quota) == 2 and quota[0].isdecimal():  # "max" in version 2, -1 in version 1
            quotas.append(int(quota[0]) / int(quota[1]))
    return min(quotas, default=None)


def free_memory(root: Path = ROOT) -> int | None:
    """Return the bytes that the process may still take; None without a limit.

    File pages that the kernel can drop are not counted as taken.
    """
    free = []
    for group in groups("memory", root):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit[0].isdecimal():
            words = _words(group / "memory.stat")
            stat = dict(zip(words[::2], words[1::2], strict=False))
            # Version 1's plain name is without the groups below.
            droppable = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
            free.append(max(0, int(limit[0]) - int(used[0]) + int(droppable)))
    return min(free, default=None)


def groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Yield the folders of the process's group and those above it that hold this controller."""
    paths: dict[str, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, names, path = line.split(":", 2)
        paths |= dict.fromkeys(names.split(","), PurePosixPath(path))  # "" is version 2's
    for line in _lines(root / "proc/self/mountinfo"):
        place, _, kind = line.partition(" - ")
        file_system, _, options = (*kind.split(" ", 2), "", "")[:3]
        name = "" if file_system == V2 else controller
        here = file_system == V2 or (file_system == "cgroup" and name in options.split(","))
        if not here or name not in paths:
            continue
        mounted, point = (PurePosixPath(word) for word in place.split(" ")[3:5])
        # In a container the mount may begin at the process's own group, or hide where that is.
        below = paths[name].relative_to(mounted) if paths[name].is_relative_to(mounted) else ""
        group = root / point.relative_to("/") / below
        for folder in (group, *group.parents):
            yield folder
            if folder == root / point.relative_to("/"):
                break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system, or a group without this limit
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
