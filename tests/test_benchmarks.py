"""The benchmark commands run and write what they say; how fast is not judged here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import start_up
from pipelines.errors import UserError
from pipelines.split import read_split

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


def test_start_up_leaves_nothing_behind(photographs: Path, tmp_path: Path) -> None:
    originals = [file.path for file in read_split(photographs, "train").files[:30]]
    for place, path in enumerate(originals):
        folder = tmp_path / "data" / "train" / f"class{place % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    file = tmp_path / "start-up.json"
    flags = ["--data", str(tmp_path / "data"), "--files", "1500", "1000", "--json", str(file)]
    assert start_up.main(flags) == 0
    result = json.loads(file.read_text())
    assert [(one["files"], one["start"]) for one in result["starts"]] == [
        (files, start) for files in (1000, 1500) for start in ("first", "again", "ImageFolder")
    ]
    assert set(result["growth"]) == {"first", "again", "ImageFolder"}
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["data", "start-up.json"]
    with pytest.raises(UserError, match="--scratch /proc: no hard links to --data"):
        start_up.main([*flags, "--scratch", "/proc"])
    with pytest.raises(UserError, match="--files must be at least 1000"):
        start_up.main([*flags[:2], "--files", "10"])
