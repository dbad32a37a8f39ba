"""Memory that a step frees serves the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = """
from resource import RUSAGE_SELF, getrusage
from benchmarks.common.rates import update
from benchmarks.training_step import synthetic_trainer, variant_recipe
from fastimagenet.allocator import keep_freed_memory
from fastimagenet.recipe_book import named_recipe

if KEEP:
    keep_freed_memory()
made = synthetic_trainer(variant_recipe(named_recipe("cifar10"), "eager", 32, 256), "cpu", 10)
images, labels = next(iter(made.train_loader))
for step in range(6):
    if step == 2:
        before = getrusage(RUSAGE_SELF).ru_minflt
    update(made, images, labels)
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


def pages_of_four_steps(keep: bool) -> int:
    """How many pages the kernel maps for them."""
    code = f"KEEP = {keep}\n{STEPS}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_steps_on_a_cpu_map_no_new_memory() -> None:
    assert pages_of_four_steps(True) < pages_of_four_steps(False) / 4
