"""The benchmark commands run and write what they say; how fast is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hosts import permitted

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("flags", [[], ["--reflect-pad", "4"]], ids=["random-crop", "reflect-pad"])
def test_loaders_writes_rates_ratios_and_what_they_were_measured_on(
    flags: list[str], cifar10: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    command = [sys.executable, "-m", "benchmarks.loaders", "--data", str(cifar10)]
    sizes = ["--image-size", "32", "--batch-size", "50", "--rounds", "2", "--seconds", "0.2"]
    output = tmp_path / "result.json"
    result = subprocess.run(
        [*command, *sizes, *flags, "--json", str(output)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "dali / dataloader" in result.stdout
    written = json.loads(output.read_text())
    assert set(written["images_per_sec"]) == {"dataloader", "torchvision", "dali", "memory"}
    for name, rates in written["rounds"].items():
        assert written["images_per_sec"][name]["mean"] == pytest.approx(sum(rates) / 2)
    assert written["versions"]["torch"] and written["hardware"] and written["date"]


def test_loaders_names_a_wrong_flag(cifar10: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.loaders", "--data", str(cifar10), "--rounds", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --rounds")


@pytest.mark.slow
@pytest.mark.skipif(not permitted(), reason="network namespaces are not permitted here")
def test_a_run_that_meets_a_fault_ends_like_one_that_does_not(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--faults", "1", "--json", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| 1 | SIGKILL worker | " in result.stdout
    written = json.loads(output.read_text())
    assert written["identical"] == 1
    (outcome,) = written["outcomes"]
    assert [statuses[-1] for statuses in outcome["commands"]] == [0, 0]
