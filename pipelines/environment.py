"""Name what a figure was measured on: processor and package versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.workers import num_cores

PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "numpy",
    "pillow",
    "apex",
)
NVJPEG = ("nvidia-nvjpeg-cu12", "nvidia-nvjpeg")
"""Packages of the library that decodes JPEGs on a GPU, for CUDA 12 and 13."""


def processor() -> str:
    """Name the cores that this process may run on, such as "2 x AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{num_cores()} x {names[0] if names else platform.machine()}"


def versions() -> dict[str, str]:
    """List the versions of Python and of those PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def nvjpeg_version() -> tuple[int, ...]:
    """Return the version of nvJPEG's package, on which DALI's depend; empty where there is none."""
    for name in NVJPEG:
        try:
            return tuple(int(part) for part in version(name).split(".")[:2])
        except PackageNotFoundError:
            continue
    return ()
