"""The rates of a recipe's phases: the command on the digits, and its arithmetic by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import RECIPE, SPLIT, make_trainer

from benchmarks.common import rates as measured
from benchmarks.common.rates import (
    ByteCounter,
    PhaseRates,
    calls_per_sec,
    one_phase,
    step_costs,
    synthetic_batch,
    train_for,
)
from benchmarks.common.statistics import estimate
from benchmarks.throughput import main, phase_result
from fastimagenet.distributed.world import World
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes.plan import Plan
from pipelines.backends import make_loader
from pipelines.errors import UserError
from pipelines.files import read_object
from pipelines.loader import LoaderSpec, Stage


def test_every_phase_of_a_recipe_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.common.rates.MATRIX", {"cpu": 64})
    monkeypatch.setattr("benchmarks.common.rates.COPY_BYTES", {"cpu": 1 << 16})
    flags = ["--device", "cpu", "--rounds", "2", "--seconds", "0.1", "--output", str(tmp_path)]
    assert main(flags) == 0
    result = read_object(tmp_path / "throughput.json")
    assert [phase["image_size"] for phase in result["phases"]] == [16, 24]
    for phase in result["phases"]:
        rates = phase["rates"]
        assert all(len(rates[part]) == 2 for part in ("loader", "model", "both"))
        assert min(rates["loader"] + rates["model"] + rates["both"]) > 0
        stalls = [
            1 - both / alone for both, alone in zip(rates["both"], rates["model"], strict=True)
        ]
        assert phase["stall"]["mean"] == pytest.approx(sum(stalls) / 2)
        assert 0 <= phase["data_wait_share"]["mean"] <= 1
        assert rates["memory_bytes"] > 2**20
    # A convolution costs as much as its image has pixels.
    flops = [phase["rates"]["flops_per_image"] for phase in result["phases"]]
    assert flops[1] / flops[0] == pytest.approx((24 / 16) ** 2, rel=0.05)
    text = (tmp_path / "table.md").read_text()
    assert "| 16 px x 64 |" in text and "Ceilings measured here" in text
    assert result["hardware"] and result["versions"]["torch"] and result["command"]


@pytest.mark.parametrize(("backend", "read"), [("synthetic", 6), ("torchvision", 14)])
def test_a_turn_begins_when_the_stock_is_used_up(
    backend: str, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five workers make ten batches ahead."""
    monkeypatch.setattr(measured, "update", lambda *_: None)
    stage = Stage(epochs=1, image_size=8, batch_size=16)
    spec = LoaderSpec(split=SPLIT, stages=(stage,), training=True, num_threads=5)
    trainer = make_trainer()
    trainer.train_loader = make_loader(backend, spec)
    numbers = iter(range(99))
    train_for(trainer, zip(numbers, numbers, strict=False), 0.0)  # type: ignore[arg-type]
    assert next(numbers) == 2 * read


def test_no_turn_on_a_gpu_queues_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake CUDA stream that does nothing until it is waited for, and a clock of calls."""
    queued: list[Event] = []
    longest = 0

    class Event:
        def synchronize(self) -> None:
            del queued[: queued.index(self) + 1]

    class Stream:
        def record_event(self) -> Event:
            nonlocal longest
            queued.append(Event())
            longest = max(longest, len(queued))
            return queued[-1]

    ticks = iter(range(99))
    monkeypatch.setattr(measured, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: queued.clear())
    calls: list[None] = []
    rate = calls_per_sec(lambda: calls.append(None), torch.device("cuda"), 30, warm_up=2)
    assert longest == 3 and not queued
    assert len(calls) == 2 + 29 and rate == 29 / 31


def test_a_batch_of_noise_needs_no_copies_of_the_images() -> None:
    phases = tuple(replace(phase, data="80") for phase in RECIPE.phases)
    plan = Plan.of(replace(RECIPE, phases=phases), 1, len(SPLIT))
    trainer: Any = SimpleNamespace(plan=plan, dtype=None, world=World())
    images, labels = synthetic_batch(trainer, SPLIT, seed=0)
    assert images.shape == (16, 3, 8, 8) and len(labels) == 16


def test_shares_and_stall_by_hand() -> None:
    rates = PhaseRates(
        image_size=32, batch_size=10, loader=[400.0, 400.0], model=[100.0, 200.0],
        both=[90.0, 190.0], data_wait_share=[0.1, 0.3], flops_per_image=2e6, bytes_per_image=3e6,
        memory_bytes=1, first_batch_seconds=0.1, compile_seconds=0.0,
    )  # fmt: skip
    result = phase_result(rates, 1e9, 2e9)
    assert result["stall"] == asdict(estimate([1 - 0.9, 1 - 0.95], signed=True))
    assert result["data_wait_share"]["mean"] == pytest.approx(0.2)
    assert result["share_of_matmul"] == pytest.approx(150 * 2e6 / 1e9)
    assert result["share_of_copy"] == pytest.approx(150 * 3e6 / 2e9)


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    left, right = torch.ones(8, 4), torch.ones(8, 4)
    with ByteCounter() as moved:
        left.reshape(32)[:3]  # views
        left + right
    assert moved.bytes == 3 * 32 * 4


def test_operations_of_a_linear_network_by_hand() -> None:
    """(8, 3, 2, 2) -> 12 -> 5: forward and the weights' gradient, 2 x 8 x 12 x 5 each."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    trainer = make_trainer(model=network)
    images, labels = torch.ones(8, 3, 2, 2), torch.zeros(8, dtype=torch.int64)
    flops, moved = step_costs(trainer, images, labels)
    assert flops == 2 * 2 * 8 * 12 * 5
    assert moved >= 4 * (8 * 12 + 12 * 5 + 8 * 5)


@pytest.mark.parametrize(
    "flags", [["--rounds", "1"], ["--seconds", "0"], ["--global-batch", "64", "--device", "cpu"]]
)
def test_a_wrong_flag_is_named(flags: list[str]) -> None:
    with pytest.raises(UserError, match=flags[0]):
        main(flags)


def test_a_phase_by_itself_has_no_frozen_layers() -> None:
    recipe = replace(named_recipe("photos"), frozen_epochs=9)
    (phase,) = one_phase(recipe, recipe.phases[1]).phases
    assert phase.epochs < recipe.frozen_epochs  # which that phase alone could not have
