"""What the campaign of faults counts and draws, and what saving costs, on the digits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TextIO

import pytest

from benchmarks.research.checkpoint_cost import main as checkpoint_cost
from pipelines.errors import UserError
from pipelines.files import read_object
from tests.commands import ROOT, SMALL
from tests.faults import __main__ as campaign
from tests.faults import runs
from tests.faults.__main__ import LAST_STEP, START_UP_SECONDS, drawn, fingerprint, table
from tests.faults.hosts import Hosts, permitted
from tests.faults.runs import KINDS, Outcome
from tests.forked import Forked, is_rank


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
    assert (met.first_step, met.repeated, met.harmless) == (25, 3, True)
    met.resumed_at = [20]  # the checkpoint of step 25 was not used
    assert (met.repeated, met.harmless) == (8, False)
    assert "| 28 | 25 | 20 | 8 TOO MANY |" in table([met])
    met.resumed_at = []  # it began anew
    assert (met.first_step, met.repeated, met.harmless) == (0, 28, False)
    met.starts = 1  # it never stopped
    assert (met.first_step, met.repeated, met.harmless) == (28, 0, True)
    met.identical = False
    assert not met.harmless


@pytest.mark.skipif(not permitted(), reason="network namespaces are not permitted here")
def test_a_run_that_meets_a_fault_ends_like_one_that_does_not(
    undisturbed: Path,
    cifar10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A killed worker on one of two hosts, beside the run that two processes of one host made."""
    flags = ("--nodes", 2, "--nproc-per-node", 1, "--checkpoint-steps", 3, "--timeout", 5)
    monkeypatch.setattr(runs, "FLAGS", (*SMALL, *flags))
    monkeypatch.setattr(runs, "is_worker", is_rank)

    def start(network: Hosts, host: int, module: str, *words: object, log: TextIO) -> Forked:
        return Forked(module, *words, cwd=ROOT, network=network.names[host], log=log)

    monkeypatch.setattr(Hosts, "start", start)
    monkeypatch.setattr(campaign, "drawn", lambda kind, _: Outcome(kind, 1, 10, 0.0))
    monkeypatch.setattr(campaign, "measured", lambda _: (1.0, fingerprint(undisturbed)))
    output = tmp_path / "result.json"
    assert campaign.main(["--faults", "1", "--data", str(cifar10), "--json", str(output)]) == 0
    assert "| 1 | SIGKILL worker | " in capsys.readouterr().out
    written = read_object(output)
    assert written["identical"] == 1
    (outcome,) = written["outcomes"]
    assert [statuses[-1] for statuses in outcome["commands"]] == [0, 0]


def test_the_number_of_faults_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--faults: must be .*, not 0"):
        campaign.main(["--faults", "0"])
    with pytest.raises(UserError, match=r"--json: .* is a folder: name"):
        campaign.main(["--json", str(tmp_path)])


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
