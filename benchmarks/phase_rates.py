"""How fast a phase of a recipe is on this machine: the loader, the model, and both together.

One process on one device. The three take turns, so that other load on the machine falls on all of
them; learning rate 0, so that nothing diverges.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from fastimagenet.assemble import make_trainer
from torch import Tensor

from benchmarks.ceilings import calls_per_sec, step_costs, synchronize
from fastimagenet import cli
from fastimagenet.distributed.world import World
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.loaders import open_loader
from fastimagenet.training.trainer import Trainer
from pipelines.datasets.split import Split
from pipelines.errors import UserError
from pipelines.loader import Loader

WARM_UP_BATCHES = 6
"""Read before each turn: more than any loader makes ahead, so none is measured on its stock."""


@dataclass(frozen=True, kw_only=True)
class PhaseRates:
    """Images per second of one process, round by round."""

    image_size: int
    batch_size: int
    loader: list[float]
    model: list[float]
    """Forward, backward and update on one synthetic batch that stays on the device."""
    both: list[float]
    data_wait_share: list[float]
    """Of the time of both together, what was spent waiting for the next batch."""
    flops_per_image: float
    bytes_per_image: float
    memory_bytes: int
    """GPU: the most that torch has allocated in this phase. CPU: the most that the process has had
    resident up to here."""
    first_batch_seconds: float
    """From asking a new loader for its first batch to having it."""
    compile_seconds: float


def one_phase(recipe: Recipe, phase: Phase) -> Recipe:
    """The recipe with this phase alone, at a constant learning rate."""
    span = (0.0, float(phase.epochs), 1.0, 1.0)
    return replace(recipe, phases=(phase,), schedule="piecewise", lr_spans=(span,))


@contextmanager
def phase_trainer(
    args: argparse.Namespace, recipe: Recipe, phase: Phase, world: World, train: Split, val: Split
) -> Iterator[Trainer]:
    """A trainer that reads this phase's batches; its loaders are closed at the end."""
    plan = Plan.of(one_phase(recipe, phase), world.world_size, len(train))
    trainer = make_trainer(args, plan, world, train, val, Stopwatch())
    try:
        yield trainer
    finally:
        trainer.train_loader.close()
        trainer.eval_loader.close()


def this_process(args: argparse.Namespace) -> World:
    """One process and device; the loader has its share of the cores, as one of several.

    Raises UserError for flags that it cannot follow.
    """
    if args.global_batch is not None:
        raise UserError("--global-batch: the rates are of one process and its own batches")
    launch = cli.launch_of(args)
    device = "cpu" if launch.device == "cpu" else "cuda:0"
    return World(local_world_size=launch.nproc_per_node, device=device)


def measure_phase(
    trainer: Trainer, args: argparse.Namespace, train: Split, rounds: int, seconds: float
) -> PhaseRates:
    """Each of the three for `seconds`, `rounds` times in turn, after a round not counted."""
    phase = trainer.plan.phases[0]
    start = time.perf_counter()
    batches = endless(trainer.train_loader)
    next(batches)
    synchronize(trainer.device)
    first_batch_seconds = time.perf_counter() - start
    if trainer.plan.recipe.compile:
        trainer.compile_all_sizes()
    images, labels = synthetic_batch(trainer, args, train)
    flops, moved = step_costs(trainer, images, labels)
    rates: dict[str, list[float]] = {"loader": [], "model": [], "both": [], "wait": []}
    for number in range(rounds + 1):
        if number == 1 and trainer.device.type == "cuda":  # cuDNN has tried its algorithms
            torch.cuda.reset_peak_memory_stats(trainer.device)
        span = seconds if number else 0.1  # round 0: files into the page cache, buffers to size
        loader = calls_per_sec(lambda: next(batches), trainer.device, span, WARM_UP_BATCHES)
        model = calls_per_sec(lambda: update(trainer, images, labels), trainer.device, span)
        both, wait = train_for(trainer, batches, span)
        values = (loader * phase.batch_size, model * phase.batch_size, both, wait)
        for row, value in zip(rates.values(), values, strict=True):
            row += [value] if number else []
    return PhaseRates(
        image_size=phase.image_size,
        batch_size=phase.batch_size,
        loader=rates["loader"],
        model=rates["model"],
        both=rates["both"],
        data_wait_share=rates["wait"],
        flops_per_image=flops / phase.batch_size,
        bytes_per_image=moved / phase.batch_size,
        memory_bytes=memory_bytes(trainer.device),
        first_batch_seconds=first_batch_seconds,
        compile_seconds=trainer.clock.read()["compile"],
    )


def endless(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches epoch after epoch."""
    while True:
        yield from loader


def synthetic_batch(
    trainer: Trainer, args: argparse.Namespace, train: Split
) -> tuple[Tensor, Tensor]:
    """Noise and labels on the device, in the shapes and types of the recipe's batches."""
    plan = trainer.plan
    loader = open_loader(
        "synthetic",
        plan.recipe,
        train,
        plan.phases,
        trainer.world,
        training=True,
        half=trainer.dtype is not None,
        seed=args.seed,
    )
    try:
        return next(iter(loader))
    finally:
        loader.close()


def update(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
    """One update that leaves the weights as they are, but for the running statistics."""
    trainer.model.train()
    trainer.update(((images, labels),), 0.0, 0.9, trainer.plan.phases[0])


def train_for(
    trainer: Trainer, batches: Iterator[tuple[Tensor, Tensor]], seconds: float
) -> tuple[float, float]:
    """Images a second of training on real batches, and the share of waiting for them."""
    for _ in range(WARM_UP_BATCHES):
        batch = next(batches)
    update(trainer, *batch)
    synchronize(trainer.device)
    waited, images, start = 0.0, 0, time.perf_counter()
    while (asked := time.perf_counter()) - start < seconds:
        batch = next(batches)
        waited += time.perf_counter() - asked
        update(trainer, *batch)
        images += len(batch[0])
        if trainer.device.type == "cuda" and images % (10 * len(batch[0])) == 0:
            torch.cuda.synchronize(trainer.device)  # as a training's log step does
    synchronize(trainer.device)
    elapsed = time.perf_counter() - start
    return images / elapsed, waited / elapsed


def memory_bytes(device: torch.device) -> int:
    """As PhaseRates has it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
