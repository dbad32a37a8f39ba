"""About a minute of measuring, from which a whole run's time is predicted."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import TypeVar

from benchmarks.common.rates import measure_phase, phase_trainer, synchronize
from benchmarks.plan.prediction import Probe, SizeRates
from fastimagenet.config import RunConfig
from fastimagenet.distributed.world import World
from fastimagenet.report.summary import hardware
from fastimagenet.training import checkpoint
from fastimagenet.training.checkpoint import CheckpointWriter
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.evaluation import evaluate
from fastimagenet.training.failures import out_of_memory_advice
from fastimagenet.training.recorder import NullRecorder
from fastimagenet.training.trainer import Trainer
from pipelines.datasets.split import Split

ROUNDS = 5
TURNS = 3 * ROUNDS + 2
"""Of each size: loader, model and both in each round, and at most two evaluations."""

MEDIANS = ("loader", "model", "both", "data_wait_share")

Item = TypeVar("Item")


def measure(
    config: RunConfig, world: World, train: Split, val: Split, clock: Stopwatch, seconds: float
) -> tuple[Probe, str, str]:
    """Probe for about `seconds`; returns hardware and precision, too. `clock`: the command's.

    Every phase is measured: rates of training and evaluation, the first batches, compiling.
    """
    recipe = config.recipe
    turn = seconds / (TURNS * len(recipe.phases))
    start_up, first_batches, compiled = 0.0, [], 0.0
    train_rates: list[SizeRates] = []
    eval_rates: dict[int, float] = {}
    for phase in recipe.phases:
        with phase_trainer(config, phase, world, train, val) as trainer:
            start_up = start_up or sum(clock.read().values())
            print(f"probing {phase.image_size} px, batch {phase.batch_size}", flush=True)
            rates = measure_phase(trainer, train, config.seed, ROUNDS, turn)
            compiled += rates.compile_seconds
            size = trainer.plan.phases[0].eval_size
            first, eval_rates[size] = eval_rate(trainer, size, "none", turn)
            first_batches.append(rates.first_batch_seconds + first)
            medians = {name: median(getattr(rates, name)) for name in MEDIANS}
            spread = (max(rates.both) - min(rates.both)) / medians["both"]
            about = {"image_size": rates.image_size, "batch_size": rates.batch_size}
            train_rates.append(SizeRates(**about, **medians, spread=spread))
            if phase is recipe.phases[-1]:
                _, tta_rate = eval_rate(trainer, size, recipe.tta, turn)
                saving, writing = time_of_checkpoint(trainer)
                facts = hardware(trainer), trainer.precision
    probe = Probe(
        num_train=len(train),
        num_val=len(val),
        start_up_seconds=start_up,
        first_batch_seconds=first_batches[0],
        compile_seconds=compiled,
        checkpoint_seconds=saving,
        last_checkpoint_seconds=writing,
        train=train_rates,
        eval_images_per_sec=eval_rates,
        tta_images_per_sec=tta_rate,
    )
    return probe, *facts


def eval_rate(trainer: Trainer, image_size: int, tta: str, seconds: float) -> tuple[float, float]:
    """Measure seconds to a first validation batch, and images/s: the median of ROUNDS parts
    of `seconds`, or of whole passes that are shorter."""
    start = time.perf_counter()
    for _ in limited(trainer.eval_loader, 0.0):
        synchronize(trainer.device)
    first = time.perf_counter() - start
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        batches = limited(trainer.eval_loader, seconds / ROUNDS)
        model = trainer.evaluated_model
        with out_of_memory_advice(trainer.plan.smallest_phase, image_size):
            counts = evaluate(
                model, batches, world=trainer.world, autocast_dtype=trainer.dtype, tta=tta
            )
        rates.append(counts.images / (time.perf_counter() - start))
    return first, median(rates)


def limited(items: Iterable[Item], seconds: float) -> Iterator[Item]:
    """Yield one item at least, and no more once the time is over."""
    start = time.perf_counter()
    for item in items:
        yield item
        if time.perf_counter() - start >= seconds:
            return


def time_of_checkpoint(trainer: Trainer) -> tuple[float, float]:
    """Measure how long an epoch's end waits for its checkpoint, and the run's end until it
    is on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), NullRecorder())
        start = time.perf_counter()
        writer.save(trainer.state_dict(), (checkpoint.EPOCH, checkpoint.BEST))
        begun = time.perf_counter()
        writer.finish()
        return begun - start, time.perf_counter() - begun
