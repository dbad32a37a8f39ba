"""The stages of DALI's CPU path are measured one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali")

from benchmarks.research.dali_stages import STAGES, main
from pipelines.errors import UserError


def test_every_stage_has_its_rate_and_its_share(
    cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stages.json"
    flags = ["--data", str(cifar10), "--size", "24", "--batch-size", "16", "--threads", "1"]
    assert main([*flags, "--rounds", "2", "--seconds", "0.05", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["stage"] for row in result["stages"]] == list(STAGES)
    for row in result["stages"]:
        assert row["images_per_sec"]["mean"] > 0 and row["cpu_ms_per_image"]["mean"] > 0
    assert result["stages"][-1]["ratio_to_loader"]["mean"] == pytest.approx(1)
    assert "| decode crop" in capsys.readouterr().out


def test_a_wrong_flag_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--rounds"):
        main(["--data", str(tmp_path), "--rounds", "1"])
