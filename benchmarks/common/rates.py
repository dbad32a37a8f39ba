"""What a device can do at most, measured, and what a training step asks of it, counted."""

from __future__ import annotations

import argparse
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.statistics import Estimate, estimate
from fastimagenet import cli
from fastimagenet.config import RunConfig
from fastimagenet.distributed.world import World
from fastimagenet.folder import result_folder
from fastimagenet.images import with_copies
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.run import build_trainer
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.loaders import open_loader
from fastimagenet.training.trainer import Trainer
from pipelines.datasets.known import ORIGINAL
from pipelines.datasets.split import Split
from pipelines.errors import UserError
from pipelines.loader import Loader

MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows and columns."""
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Beyond any cache."""


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls_per_sec(
    call: Callable[[], object], device: torch.device, seconds: float, warm_up: int = 1
) -> float:
    """Measure the calls a second over at least `seconds`, after calls that are not counted."""
    for _ in range(warm_up):
        call()
    synchronize(device)
    queued: deque[torch.cuda.Event] = deque()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        count += 1
        if device.type == "cuda":
            queued.append(torch.cuda.current_stream(device).record_event())
            if len(queued) > 2:  # or calls that take no time to queue would be seconds ahead
                queued.popleft().synchronize()
    synchronize(device)
    return count / (time.perf_counter() - start)


def matmul_flops_per_sec(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Measure the floating-point operations a second of a large square matrix product."""
    size = MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    rate = calls_per_sec(lambda: torch.mm(left, right, out=product), device, seconds)
    return 2 * size**3 * rate


def copy_bytes_per_sec(device: torch.device, seconds: float) -> float:
    """Measure the bytes read and written a second by a large copy in the device's memory."""
    size = COPY_BYTES[device.type]
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size * calls_per_sec(lambda: target.copy_(source), device, seconds)


def ceilings(
    device: torch.device, dtype: torch.dtype, rounds: int, seconds: float
) -> tuple[Estimate, Estimate]:
    """Measure FLOP/s of a matrix product and bytes/s of a copy, in turns of `seconds` each."""
    turns = [
        (matmul_flops_per_sec(device, dtype, seconds), copy_bytes_per_sec(device, seconds))
        for _ in range(rounds + 1)
    ]
    products, copies = zip(*turns[1:], strict=True)  # at first the clocks of an idle GPU are low
    return estimate(products), estimate(copies)


class ByteCounter(TorchDispatchMode):
    """Sums the bytes of the tensors that every operation takes and gives; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))
        return result


def step_costs(trainer: Trainer, images: Tensor, labels: Tensor) -> tuple[int, int]:
    """Count the floating-point operations and bytes of the forward and backward pass of a batch.

    Operations: matrix products and convolutions, a multiply-add counts as two. Bytes: what every
    operation of the uncompiled network reads and writes; fusing and caches make it less. The
    update of the weights is left out of both.
    """
    trainer.model.train()
    with FlopCounterMode(display=False) as flops, ByteCounter() as moved:
        with torch.autocast(trainer.device.type, trainer.dtype, enabled=trainer.dtype is not None):
            logits = trainer.model(images)
        cross_entropy(logits.float(), labels).backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    return flops.get_total_flops(), moved.bytes


WARM_UP_BATCHES = 6
"""Read before each turn: more than a loader makes ahead, so none is measured on its stock. One with
processes makes two ahead in each."""


def warm_up_batches(processes: int) -> int:
    """Return how many batches to read before a turn of a loader with so many processes."""
    return max(WARM_UP_BATCHES, 2 * processes + 4)


def processes_of(loader: Loader) -> int:
    """Count the processes that make a loader's batches; 0 where it has threads, or none."""
    from pipelines.backends.torchvision import TorchvisionLoader

    return loader.spec.num_threads if isinstance(loader, TorchvisionLoader) else 0


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
    """Return the recipe with this phase alone, at a constant LR at which all layers learn."""
    span = (0.0, float(phase.epochs), 1.0, 1.0)
    return replace(recipe, phases=(phase,), schedule="piecewise", lr_spans=(span,), frozen_epochs=0)


@contextmanager
def phase_trainer(
    config: RunConfig, phase: Phase, world: World, train: Split, val: Split
) -> Iterator[Trainer]:
    """Build a trainer that reads this phase's batches; its loaders are closed at the end."""
    plan = Plan.of(one_phase(config.recipe, phase), world.world_size, len(train))
    trainer = build_trainer(config, plan, world, train, val, Stopwatch())
    with closing(trainer.train_loader), closing(trainer.eval_loader):
        yield trainer


@contextmanager
def run_config(args: argparse.Namespace, prefix: str) -> Iterator[RunConfig]:
    """Return what the flags ask for, with the copies that are there and a folder named `prefix`."""
    with result_folder(cli.run_config(args), prefix) as config:
        yield replace(config, recipe=with_copies(config.recipe, config.data.root))


def this_process(config: RunConfig) -> World:
    """Return one process and device; its loader has a share of the cores, as one of several.

    Raises UserError for flags that it cannot follow.
    """
    if config.global_batch is not None:
        raise UserError("--global-batch: the rates are of one process and its own batches")
    launch = config.launch.resolved()
    return World(local_world_size=launch.processes, device=launch.first_device)


def measure_phase(
    trainer: Trainer, train: Split, seed: int, rounds: int, seconds: float
) -> PhaseRates:
    """Measure each of the three for `seconds`, `rounds` times in turn, after one not counted."""
    phase = trainer.plan.phases[0]
    start = time.perf_counter()
    batches = endless(trainer.train_loader)
    next(batches)
    synchronize(trainer.device)
    first_batch_seconds = time.perf_counter() - start
    if trainer.plan.recipe.compile:
        trainer.compile_all_sizes()
    images, labels = synthetic_batch(trainer, train, seed)
    flops, moved = step_costs(trainer, images, labels)
    ahead = warm_up_batches(processes_of(trainer.train_loader))
    names = ("loader", "model", "both", "data_wait_share")
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        if number == 1 and trainer.device.type == "cuda":  # cuDNN has tried its algorithms
            torch.cuda.reset_peak_memory_stats(trainer.device)
        span = seconds if number else 0.1  # round 0: files into the page cache, buffers to size
        loader = calls_per_sec(lambda: next(batches), trainer.device, span, ahead)
        model = calls_per_sec(lambda: update(trainer, images, labels), trainer.device, span)
        both, wait = train_for(trainer, batches, span)
        values = (loader * phase.batch_size, model * phase.batch_size, both, wait)
        for row, value in zip(rates.values(), values, strict=True):
            row += [value] if number else []
    return PhaseRates(
        image_size=phase.image_size,
        batch_size=phase.batch_size,
        **rates,
        flops_per_image=flops / phase.batch_size,
        bytes_per_image=moved / phase.batch_size,
        memory_bytes=memory_bytes(trainer.device),
        first_batch_seconds=first_batch_seconds,
        compile_seconds=trainer.clock.read()["compile"],
    )


def endless(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches epoch after epoch."""
    while True:
        yield from loader


def synthetic_batch(trainer: Trainer, train: Split, seed: int) -> tuple[Tensor, Tensor]:
    """Make noise and labels on the device, in the shapes and types of the recipe's batches."""
    plan, half = trainer.plan, trainer.dtype is not None
    # No file is read: nor of a copy of the data.
    stages, world = tuple(replace(p, data=ORIGINAL) for p in plan.phases), trainer.world
    with closing(
        open_loader(
            "synthetic", plan.recipe, train, stages, world, training=True, half=half, seed=seed
        )
    ) as loader:
        return next(iter(loader))


def update(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
    """Do a training step that leaves the weights as they are, except for the running statistics."""
    if not trainer.model.training:  # to set it takes longer than some steps
        trainer.model.train()
    trainer.update(((images, labels),), 0.0, 0.9, trainer.plan.phases[0])


def train_for(
    trainer: Trainer, batches: Iterator[tuple[Tensor, Tensor]], seconds: float
) -> tuple[float, float]:
    """Measure images a second of training on real batches, and the share of waiting for them."""
    for _ in range(warm_up_batches(processes_of(trainer.train_loader))):
        batch = next(batches)
    update(trainer, *batch)
    synchronize(trainer.device)
    waited, images, start = 0.0, 0, time.perf_counter()
    while (asked := time.perf_counter()) - start < seconds:
        batch = next(batches)
        waited += 0.0 if trainer.busy() else time.perf_counter() - asked
        update(trainer, *batch)
        images += len(batch[0])
        if trainer.device.type == "cuda" and images % (10 * len(batch[0])) == 0:
            torch.cuda.synchronize(trainer.device)  # as a training's log step does
    synchronize(trainer.device)
    elapsed = time.perf_counter() - start
    return images / elapsed, waited / elapsed


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory, as PhaseRates has it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
