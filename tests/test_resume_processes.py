"""Two processes that resume from a checkpoint train on as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing, nn

from fastimagenet.distributed.collectives import process_group
from fastimagenet.distributed.world import World
from fastimagenet.errors import Stopped
from fastimagenet.models import build_model
from fastimagenet.models.speednet import SpeedBlock, SpeedNet
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.run import whiten
from fastimagenet.training import checkpoint
from fastimagenet.training.loaders import open_loader
from fastimagenet.training.trainer import Trainer
from pipelines.datasets.split import Split, read_split
from pipelines.workers import hidden_main
from tests.commands import free_endpoint
from tests.test_trainer import Killed, tiny_model

RECIPE = Recipe(
    name="test",
    model="smallnet",
    phases=(
        Phase(epochs=2, image_size=12, batch_size=30),
        Phase(epochs=1, image_size=16, batch_size=20),
    ),
    max_lr=0.1,
    ema_decay=0.9,
)
SPEED = named_recipe("cifar10-speed")
SPEED = replace(
    SPEED,
    phases=tuple(replace(phase, image_size=16, batch_size=40) for phase in SPEED.phases),
    ema_decay=0.9,
    precision="fp32",
    tta="none",
).stretched(2)
"""Muon, whitening and alternating flip, with an average of the weights."""


@dataclass(frozen=True)
class Scenario:
    """A training on 250 images, killed some steps after the first of its second phase."""

    backend: str
    kill_offset: int
    recipe: Recipe = RECIPE
    accumulation: int = 1


SCENARIOS = (
    Scenario("dali", 0, accumulation=2),
    Scenario("torchvision", -1),
    Scenario("memory", 1, recipe=SPEED),
)


def make(
    scenario: Scenario, world: World, splits: tuple[Split, Split], folder: Path, every: int = 0
) -> Trainer:
    recipe, (train, val) = scenario.recipe, splits
    global_batch = recipe.phases[0].batch_size * 2 * scenario.accumulation
    plan = Plan.of(recipe, 2, len(train), global_batch)
    torch.manual_seed(1)
    if recipe is SPEED:
        model = build_model(recipe, 10)
        assert isinstance(model, SpeedNet)
        model.blocks = nn.Sequential(SpeedBlock(24, 8), SpeedBlock(8, 16), SpeedBlock(16, 16))
        model.fc = nn.Linear(16, 10, bias=False)
        whiten(model, scenario.backend, recipe, train, world)
    else:
        model = tiny_model()
        model[-1] = nn.Linear(8, 10)  # type: ignore[operator]
    loaders = [
        open_loader(
            scenario.backend,
            recipe,
            train if training else val,
            plan.phases if training else plan.eval_stages(),
            world,
            training=training,
            half=False,
            seed=3,
            accumulation=plan.accumulation if training else 1,
        )
        for training in (True, False)
    ]
    return Trainer(plan, model, *loaders, world=world, folder=folder, checkpoint_steps=every)


def end_of(trainer: Trainer) -> tuple[dict[str, torch.Tensor], list[object]]:
    """Weights with their averages, and the figures of every epoch."""
    assert trainer.ema is not None
    figures: list[object] = [
        (r.train_loss, r.val_loss, r.top1, r.tta_top1) for r in trainer.records
    ]
    return trainer.ema.state_dict() | trainer.model.state_dict(), figures


def one_process(rank: int, endpoint: str, data: Path, root: Path) -> None:
    """All scenarios, so that the processes are started once."""
    host, _, port = endpoint.partition(":")
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    world, train = World(rank, rank, 2, 2), read_split(data, "train")
    splits = train.take(np.arange(0, len(train), 2)), read_split(data, "val")
    with process_group(world, 120):
        for index, scenario in enumerate(SCENARIOS):
            whole = make(scenario, world, splits, root / f"{index} whole")
            whole.fit()
            check(scenario, whole, world, splits, root / f"{index} killed")
            if index == 1:
                check_stopped(scenario, whole, world, splits, root / "stopped")


def check_stopped(
    scenario: Scenario, whole: Trainer, world: World, splits: tuple[Split, Split], folder: Path
) -> None:
    """Only one process is asked to stop, in an evaluation: both leave it, and resume before it."""
    store = torch.distributed.distributed_c10d._get_default_store()
    first, asked = make(scenario, world, splits, folder), 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        if world.is_main and asked == 2:
            store.wait(["said/stop"])
        return not world.is_main

    first._stopping = stopping  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.fit()
    assert asked <= (2 if world.is_main else 1), "of five batches"
    torch.distributed.barrier()
    second = make(scenario, world, splits, folder)
    torch.manual_seed(99)
    second.load_state_dict(checkpoint.load(folder / "checkpoints" / "last.pt"))
    assert (second.step, second.epoch) == (whole.plan.phases[0].steps_per_epoch, 0)
    second.fit()
    check_ends(second, whole, "stopped")


def check(
    scenario: Scenario,
    whole: Trainer,
    world: World,
    splits: tuple[Split, Split],
    folder: Path,
) -> None:
    """Saved at that step, killed an update later, and resumed by another trainer."""
    killed_at = whole.plan.phases[1].first_step + scenario.kill_offset
    first = make(scenario, world, splits, folder, every=killed_at)
    update = first.train_step

    def dying(*arguments: object) -> torch.Tensor:
        if first.step == killed_at:
            raise Killed
        return update(*arguments)  # type: ignore[arg-type]

    first.train_step = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        first.fit()
    torch.distributed.barrier()
    second = make(scenario, world, splits, folder)
    torch.manual_seed(99)
    second.load_state_dict(checkpoint.load(folder / "checkpoints" / "last.pt"))
    assert second.step == killed_at
    second.fit()
    check_ends(second, whole, (scenario, killed_at))


def check_ends(resumed: Trainer, whole: Trainer, case: object) -> None:
    """The same weights and figures."""
    (weights, figures), (expected, expected_figures) = end_of(resumed), end_of(whole)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), (case, name)
    assert figures == expected_figures


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(cifar10: Path, tmp_path: Path) -> None:
    """One step before a phase begins, at its start and one after; over all back ends."""
    arguments = (free_endpoint(), cifar10, tmp_path)
    with hidden_main():
        multiprocessing.start_processes(one_process, arguments, nprocs=2, start_method="forkserver")
