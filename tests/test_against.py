"""Two trees' loaders take turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali")

from benchmarks.research.against import MEASURES, main
from pipelines.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_a_tree_is_measured_against_itself(cifar10: Path, tmp_path: Path) -> None:
    file = tmp_path / "against.json"
    flags = ["--before", str(ROOT), "--data", str(cifar10), "--size", "24", "--batch-size", "16"]
    times = ["--threads", "1", "--rounds", "2", "--seconds", "0.05", "--json", str(file)]
    assert main([*flags, *times]) == 0
    rows = json.loads(file.read_text())["measures"]
    assert [row["measure"] for row in rows] == list(MEASURES)
    for row in rows:
        before, after = row["before"]["mean"], row["after"]["mean"]
        assert before > 0 and after > 0 and row["ratio"]["low"] <= row["ratio"]["mean"]


def test_a_folder_that_is_no_tree_is_named(cifar10: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--before {tmp_path} is no tree"):
        main(["--before", str(tmp_path), "--data", str(cifar10)])
