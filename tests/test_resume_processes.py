"""Two processes that begin again from a checkpoint train on as if nothing had been, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

from fastimagenet.distributed.collectives import process_group
from fastimagenet.distributed.world import World
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.training import checkpoint
from fastimagenet.training.trainer import Trainer
from pipelines.backends import make_loader
from pipelines.datasets.split import Split, read_split
from pipelines.loader import Loader, LoaderSpec
from tests.test_train import free_endpoint
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
SCENARIOS = {"dali": 1, "torchvision": 1, "dali, gradients added up": 2}
"""Batches an update; 500 images make 8, 8 and 12 updates of two processes, or half as many."""


def loader(
    backend: str, plan: Plan, world: World, train: Split, val: Split, training: bool
) -> Loader:
    spec = LoaderSpec(
        split=train if training else val,
        stages=plan.phases if training else plan.eval_stages(),
        training=training,
        shard_id=world.rank,
        num_shards=world.world_size,
        accumulation=plan.accumulation if training else 1,
        seed=3,
        num_threads=1 if backend == "dali" else 0,
    )
    return make_loader(backend, spec)


def make(scenario: str, world: World, data: Path, folder: Path, every: int = 0) -> Trainer:
    train, val = read_split(data, "train"), read_split(data, "val")
    accumulation = SCENARIOS[scenario]
    plan = Plan.of(RECIPE, 2, len(train), 60 * accumulation)
    torch.manual_seed(1)
    model = tiny_model()
    model[-1] = nn.Linear(8, 10)  # type: ignore[operator]
    backend = scenario.partition(",")[0]
    return Trainer(
        plan,
        model,
        *(loader(backend, plan, world, train, val, training) for training in (True, False)),
        world=world,
        folder=folder,
        checkpoint_steps=every,
    )


def end_of(trainer: Trainer) -> tuple[dict[str, torch.Tensor], list[object]]:
    """Weights with their averages, and the figures of every epoch."""
    assert trainer.ema is not None
    figures: list[object] = [(r.train_loss, r.val_loss, r.top1) for r in trainer.records]
    return trainer.ema.state_dict() | trainer.model.state_dict(), figures


def one_process(rank: int, endpoint: str, data: Path, root: Path) -> None:
    """All scenarios, so that the processes are started once."""
    host, _, port = endpoint.partition(":")
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    world = World(rank, rank, 2, 2)
    with process_group(world, 120):
        for scenario in SCENARIOS:
            whole = make(scenario, world, data, root / scenario)
            whole.fit()
            boundary = whole.plan.phases[1].first_step
            for killed_at in (boundary - 1, boundary, boundary + 1):
                check(scenario, whole, killed_at, world, data, root / f"{scenario} {killed_at}")


def check(
    scenario: str, whole: Trainer, killed_at: int, world: World, data: Path, folder: Path
) -> None:
    """Saved at `killed_at`, killed an update later, and gone on with by another trainer."""
    first = make(scenario, world, data, folder, every=killed_at)
    update = first.train_step

    def dying(*arguments: object) -> torch.Tensor:
        if first.step == killed_at:
            raise Killed
        return update(*arguments)  # type: ignore[arg-type]

    first.train_step = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        first.fit()
    torch.distributed.barrier()
    second = make(scenario, world, data, folder)
    torch.manual_seed(99)
    second.load_state_dict(checkpoint.load(folder / "checkpoints" / "last.pt"))
    assert second.step == killed_at
    second.fit()
    (weights, figures), (expected, expected_figures) = end_of(second), end_of(whole)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), (scenario, killed_at, name)
    assert figures == expected_figures


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(cifar10: Path, tmp_path: Path) -> None:
    """One step before a phase begins, at its start and one after; both back ends; added up."""
    multiprocessing.spawn(one_process, (free_endpoint(), cifar10, tmp_path), nprocs=2)
