"""Memory that a step frees serves the next one."""

from __future__ import annotations

import multiprocessing
import os
import sys
from resource import RUSAGE_SELF, getrusage

import pytest
import torch
from torch import Tensor, nn

from fastimagenet.machine import keep_freed_memory, spin_briefly
from pipelines.workers import hidden_main


def pages_of_four_steps(layers: nn.Module, images: Tensor) -> int:
    """Count the pages that the kernel maps, once two steps are done."""
    for step in range(6):
        if step == 2:
            before = getrusage(RUSAGE_SELF).ru_minflt
        layers(images).sum().backward()
    return getrusage(RUSAGE_SELF).ru_minflt - before


def keep_freed_pages() -> None:
    """The command's setting cannot be taken back: in a process of its own."""
    layers = nn.Sequential(nn.Conv2d(3, 48, 1), nn.ReLU())
    images = torch.randn(64, 3, 64, 64)  # activations of 48 MiB: above what glibc keeps by itself
    by_default = pages_of_four_steps(layers, images)
    keep_freed_memory()
    kept = pages_of_four_steps(layers, images)
    assert kept < by_default / 4, (kept, by_default)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_steps_on_a_cpu_map_no_new_memory() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=keep_freed_pages)
    with hidden_main():
        process.start()
    process.join()
    assert process.exitcode == 0


def test_threads_spin_briefly_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    spin_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
