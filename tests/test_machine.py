"""Memory that a step frees serves the next one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastimagenet.machine import spin_briefly

ROOT = Path(__file__).resolve().parent.parent
STEPS = """
from resource import RUSAGE_SELF, getrusage
import torch
from torch import nn
from fastimagenet.machine import keep_freed_memory

layers = nn.Sequential(nn.Conv2d(3, 48, 1), nn.ReLU())
images = torch.randn(64, 3, 64, 64)  # activations of 48 MiB: above what glibc keeps by itself

def pages_of_four_steps():
    for step in range(6):
        if step == 2:
            before = getrusage(RUSAGE_SELF).ru_minflt
        layers(images).sum().backward()
    return getrusage(RUSAGE_SELF).ru_minflt - before

by_default = pages_of_four_steps()
keep_freed_memory()
print(by_default, pages_of_four_steps())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_steps_on_a_cpu_map_no_new_memory() -> None:
    """Counted as the pages that the kernel maps."""
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_default, kept = map(int, done.stdout.split())
    assert kept < by_default / 4


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
