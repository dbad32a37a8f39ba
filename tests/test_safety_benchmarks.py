"""What the campaign of faults counts and draws, and what saving costs, on the digits."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.research.checkpoint_cost import main as checkpoint_cost
from pipelines.files import read_object
from tests.faults.__main__ import LAST_STEP, START_UP_SECONDS, drawn, table
from tests.faults.runs import KINDS, Outcome


def test_the_same_seed_draws_the_same_faults() -> None:
    faults = [
        [drawn(kind, generator) for kind in KINDS * 20]
        for generator in (random.Random(4), random.Random(4))
    ]
    assert faults[0] == faults[1]
    assert {fault.host for fault in faults[0]} == {0, 1}
    for fault in faults[0]:
        assert 0 <= fault.after_step <= LAST_STEP
        assert 0 <= fault.after_seconds <= START_UP_SECONDS
        if fault.kind.startswith(("checkpoint", "disk")):
            assert fault.after_step > 0


def test_what_a_fault_may_cost() -> None:
    met = Outcome("SIGKILL worker", 1, 20, 0.1, saved=25, done=28, identical=True)
    met.starts, met.resumed_at = 2, [25]
    assert (met.went_on_at, met.repeated, met.harmless) == (25, 3, True)
    met.resumed_at = [20]  # the checkpoint of step 25 was not used
    assert (met.repeated, met.harmless) == (8, False)
    assert "| 28 | 25 | 20 | 8 TOO MANY |" in table([met])
    met.resumed_at = []  # it began anew
    assert (met.went_on_at, met.repeated, met.harmless) == (0, 28, False)
    met.starts = 1  # it never stopped
    assert (met.went_on_at, met.repeated, met.harmless) == (28, 0, True)
    met.identical = False
    assert not met.harmless


def test_the_cost_of_a_checkpoint_is_measured(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--rounds", "2", "--interval", "2", "--output", str(tmp_path)]
    assert checkpoint_cost(flags) == 0
    result = read_object(tmp_path / "checkpoint_cost.json")
    steps, parts = result["rounds_step_seconds"], result["rounds_save_seconds"]
    assert all(len(steps[way]) == 2 for way in ("without", "beside", "in line"))
    assert all(
        len(values) == 2 and min(values) > 0 for values in (*steps.values(), *parts.values())
    )
    products = [a / b for a, b in zip(steps["beside"], steps["without"], strict=True)]
    assert (
        abs((1 + result["added"]["beside"]["mean"]) ** 2 / (products[0] * products[1]) - 1) < 1e-6
    )
    assert result["bytes"] > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_cost.json", "table.md"]
