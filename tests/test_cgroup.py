"""A container's CPU quota and memory limit hold in place of the host's.

The files are laid out as Linux has them, for both versions and where containers are mounted.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastimagenet import machine
from pipelines import cgroup
from pipelines.backends.memory import free_memory
from pipelines.environment import processor
from pipelines.workers import num_cores

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "36 31 0:32 {root} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
)
V1_GROUP = "4:memory:/docker/7f\n2:cpu,cpuacct:/docker/7f\n1:name=systemd:/docker/7f\n"
GIB = 2**30


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(root: Path, group: str, **limits: str) -> Path:
    """A group "/a/b" of version 2, and files such as a_b__cpu_max="..." by group and name."""
    files = {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": V2_MOUNT}
    for key, text in limits.items():
        place, _, name = key.rpartition("__")
        folder = "sys/fs/cgroup/" + "".join(f"{part}/" for part in place.split("_") if part)
        files[folder + name.replace("_", ".", 1)] = text
    return lay_out(root, files)


def test_a_quota_of_version_2_and_the_tighter_one_above_it(tmp_path: Path) -> None:
    root = v2(tmp_path, "/a/b", a_b__cpu_max="400000 100000\n", a__cpu_max="150000 100000\n")
    assert cgroup.cpu_quota(root) == 1.5


def test_in_a_container_of_version_2_the_group_is_the_root(tmp_path: Path) -> None:
    root = v2(tmp_path, "/", __cpu_max="50000 100000\n")
    assert cgroup.cpu_quota(root) == 0.5


@pytest.mark.parametrize("text", ["max 100000\n", "", "?"])
def test_no_quota_of_version_2(tmp_path: Path, text: str) -> None:
    assert cgroup.cpu_quota(v2(tmp_path, "/a", a__cpu_max=text)) is None


def v1(root: Path, mounted: str, quota: str, place: str) -> Path:
    return lay_out(
        root,
        {
            "proc/self/cgroup": V1_GROUP,
            "proc/self/mountinfo": V1_MOUNTS.format(root=mounted),
            f"sys/fs/cgroup/cpu,cpuacct{place}/cpu.cfs_quota_us": quota,
            f"sys/fs/cgroup/cpu,cpuacct{place}/cpu.cfs_period_us": "100000\n",
            f"sys/fs/cgroup/memory{place}/memory.limit_in_bytes": f"{4 * GIB}\n",
            f"sys/fs/cgroup/memory{place}/memory.usage_in_bytes": f"{3 * GIB}\n",
            f"sys/fs/cgroup/memory{place}/memory.stat": (
                f"inactive_file 4096\ntotal_inactive_file {GIB}\n"
            ),
        },
    )


@pytest.mark.parametrize(
    ("mounted", "place"),
    [("/", "/docker/7f"), ("/docker/7f", ""), ("/elsewhere", "")],
    ids=["on the host", "mounted at the group", "hidden"],
)
def test_quota_and_memory_of_version_1(tmp_path: Path, mounted: str, place: str) -> None:
    root = v1(tmp_path, mounted, "250000\n", place)
    assert cgroup.cpu_quota(root) == 2.5
    assert cgroup.free_memory(root) == 2 * GIB


def test_no_quota_of_version_1(tmp_path: Path) -> None:
    assert cgroup.cpu_quota(v1(tmp_path, "/", "-1\n", "/docker/7f")) is None


def test_free_memory_of_version_2_counts_file_pages_as_free(tmp_path: Path) -> None:
    root = v2(
        tmp_path,
        "/a/b",
        a_b__memory_max="max\n",
        a_b__memory_current=f"{GIB}\n",
        a__memory_max=f"{2 * GIB}\n",
        a__memory_current=f"{GIB}\n",
        a__memory_stat=f"anon 12\ninactive_file {GIB // 2}\n",
    )
    assert cgroup.free_memory(root) == 3 * GIB // 2


def test_an_overdrawn_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"a__memory_max": "100\n", "a__memory_current": "200\n"}
    assert cgroup.free_memory(v2(tmp_path, "/a", **files)) == 0


def test_another_system_has_no_limits(tmp_path: Path) -> None:
    assert cgroup.cpu_quota(tmp_path) is None
    assert cgroup.free_memory(tmp_path) is None


def test_cores_hardware_threads_and_the_memory_check_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = v2(
        tmp_path, "/", __cpu_max="70000 100000\n", __memory_max="4096\n", __memory_current="96"
    )
    quota, free = cgroup.cpu_quota(root), cgroup.free_memory(root)
    for module in (cgroup, machine):
        monkeypatch.setattr(module, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cgroup, "free_memory", lambda: free)
    assert num_cores() == 1
    assert processor().startswith("1 x ")
    assert free_memory(torch.device("cpu")) == 4000
    monkeypatch.setattr(machine, "ASKED_THREADS", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    machine.share_out_quota()
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_threads_that_the_user_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    monkeypatch.setattr(machine, "ASKED_THREADS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.share_out_quota()
    assert os.environ["OMP_NUM_THREADS"] == "3"
