"""The learning-rate finder: short trainings with a rising LR that leave the trainer unchanged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from fastimagenet.distributed.collectives import all_reduce_sum
from fastimagenet.lr_finder.sweep import (
    DebiasedAverage,
    DivergenceRule,
    Ended,
    Sweep,
    SweepConfig,
    SweepRecord,
    check_validation,
)
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.evaluation import evaluate
from fastimagenet.training.failures import out_of_memory_advice
from fastimagenet.training.recorder import NullRecorder, Recorder
from fastimagenet.training.trainer import Trainer
from pipelines.errors import UserError
from pipelines.formats import plain
from pipelines.loader import Loader


def lr_find2(
    trainer: Trainer,
    start_lr: float | Sequence[float] = 1e-5,
    end_lr: float = 10,
    num_it: int = 100,
    wds: float | Sequence[float] | None = None,
    linear: bool = False,
    stop_dv: bool = True,
    *,
    momentum: float | None = None,
    on_record: Callable[[SweepRecord], None] | None = None,
) -> Sweep:
    """Train `num_it` updates with a LR that rises from start_lr to end_lr; restore everything.

    What fastai 0.7 offered under this name. Each update is followed by an evaluation of the next
    validation batch. `wds`: the weight decay in place of the recipe's. `start_lr` and `wds` take
    one value or, as in fastai 0.7, one for each of the recipe's layer groups, stem to head: all
    LRs rise by the same factors, and `end_lr`, the records' LR and the Sweep's weight decay are the
    last group's. In the recipe's frozen epochs that group alone learns. `linear`: the LR rises
    linearly, not exponentially. `stop_dv`: end early, before recording that batch, once the
    smoothed loss is not finite or above 4 x its best. `momentum` defaults to that of the plan
    where its LR peaks: the LR found has to work with that one. `on_record` is called after every
    recorded iteration, on every process. `trainer.stop_requested` also ends the sweep.

    All processes have to call it and get the same Sweep. It begins at the trainer's step in the
    plan and stays in that phase, over the ends of epochs. The trainer, its model, optimizer,
    loaders and torch's random state are left bit for bit as they were, even after an error; the
    seconds are added to the clock's section "other".
    Each iteration is evaluated on one validation batch: give the trainer a validation loader that
    mixes the classes, since folders are listed by class (the command shuffles).
    Raises UserError for an argument out of range, named as the command's flag, for a validation
    set smaller than a batch, and for what an update can raise.
    """
    groups = trainer.plan.recipe.num_layer_groups
    start_lrs = _by_group("start_lr", start_lr, groups)
    decays = () if wds is None else _by_group("wds", wds, groups)
    config = SweepConfig(
        start_lr=start_lrs[-1],
        end_lr=end_lr,
        num_it=num_it,
        weight_decays=decays[-1:],
        momenta=() if momentum is None else (momentum,),
        linear=linear,
        stop_dv=stop_dv,
    )
    ((weight_decay, momentum),) = config.combinations(trainer.plan)
    for lr in start_lrs:
        replace(config, start_lr=lr, end_lr=max(end_lr, 2 * lr))  # which checks each
    for decay in decays:
        replace(config, weight_decays=(decay,))
    return one_sweep(trainer, config, weight_decay, momentum, on_record, start_lrs, decays)


def _by_group(name: str, value: float | Sequence[float], groups: int) -> tuple[float, ...]:
    """Return one value, or one a layer group. Raises UserError for another number of them."""
    values = (float(value),) if isinstance(value, int | float) else tuple(map(float, value))
    if len(values) not in (1, groups):
        raise UserError(
            f"{name} has {len(values)} values where the recipe has {groups} layer "
            f"group{'s' if groups > 1 else ''} (its field layer_lrs): give one, or one a group"
        )
    return values


def one_sweep(
    trainer: Trainer,
    config: SweepConfig,
    weight_decay: float,
    momentum: float,
    on_record: Callable[[SweepRecord], None] | None = None,
    start_lrs: Sequence[float] = (),
    decays: Sequence[float] = (),
) -> Sweep:
    """Make the sweep of `config` with one weight decay and momentum, as `lr_find2` describes.

    `start_lrs` and `decays`: with more than one value, those of each layer group.
    """
    records: list[SweepRecord] = []

    def keep(record: SweepRecord) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    with restored(trainer):
        for group in trainer.optimizer.param_groups:
            layer = group.get("layer", 0)
            if len(start_lrs) > 1:
                group["layer_factor"] = start_lrs[layer] / start_lrs[-1]
            if group["decays"]:
                decay = decays[layer] if len(decays) > 1 else weight_decay
                group["weight_decay"] = decay / group.get("lr_factor", 1.0)
        ended = run(trainer, config, momentum, keep)
    return Sweep(
        weight_decay=weight_decay,
        momentum=momentum,
        num_it=config.num_it,
        linear=config.linear,
        records=tuple(records),
        ended=ended,
    )


def sweep_all(trainer: Trainer, config: SweepConfig, folder: Path | None) -> Iterator[Sweep]:
    """Yield one sweep for each combination of `config`, all on the same batches.

    A sweep that was stopped is the last. Rank 0 writes the rows to `folder`/metrics.jsonl, unless
    `folder` is None, and shows the progress. The trainer's loaders are closed at the end.
    """
    combinations = config.combinations(trainer.plan)
    recorder: SweepRecorder = NullSweepRecorder()
    if folder is not None and trainer.world.is_main:
        recorder = SweepRecorder(folder, len(combinations) * config.num_it)
    recorder.start(0, [])
    try:
        for index, (weight_decay, momentum) in enumerate(combinations):
            record = partial(recorder.record, index, weight_decay, trainer.clock)
            done = one_sweep(trainer, config, weight_decay, momentum, record)
            recorder.end_of_sweep(index, len(combinations), done)
            yield done
            if done.ended == "stopped":
                break
    finally:
        trainer.train_loader.close()
        trainer.eval_loader.close()
        recorder.close()
    recorder.unwritten.check()


@contextmanager
def restored(trainer: Trainer) -> Iterator[None]:
    """Run the block in the clock's section "other", then restore the trainer, even on errors."""
    with trainer.clock.section("other"):
        before = copy.deepcopy(trainer.state_dict())
        modes = {module: module.training for module in trainer.model.modules()}
        scaler, communication = trainer.scaler, trainer.communication
        try:
            # An interrupted update would leave traces in these two: the block gets its own.
            trainer.scaler, trainer.communication = copy.deepcopy(scaler), None
            yield
        finally:
            trainer.scaler, trainer.communication = scaler, communication
            trainer.load_state_dict(before)
            trainer.optimizer.zero_grad(set_to_none=True)
            for module, training in modes.items():
                module.training = training


def run(
    trainer: Trainer, config: SweepConfig, momentum: float, keep: Callable[[SweepRecord], None]
) -> Ended:
    """Make the updates and evaluations of a sweep; pass each record to `keep`."""
    plan = trainer.plan
    stages = plan.eval_stages()
    phase = plan.phase_of_epoch(trainer.train_loader.epoch)
    image_size = stages[min(trainer.eval_loader.epoch, len(stages) - 1)].image_size
    train_batches = endless(trainer.train_loader, plan.phase_of_epoch)
    updates = zip(*[train_batches] * plan.accumulation, strict=False)
    val_batches = endless(trainer.eval_loader, lambda e: stages[min(e, len(stages) - 1)])
    average, rule, any_finite = DebiasedAverage(), DivergenceRule(), False
    trainer.model.train()
    for iteration, batches in zip(range(config.num_it), updates, strict=False):
        lr = config.lr(iteration)
        loss, stop = agreed(trainer, trainer.update(batches, lr, momentum, phase))
        loss = average.update(loss)
        if stop:
            return "stopped"
        if config.stop_dv and (verdict := rule.verdict(iteration, loss)):
            return verdict
        with out_of_memory_advice(plan.smallest_phase, image_size):
            counts = evaluate(
                trainer.model,
                islice(val_batches, 1),
                world=trainer.world,
                autocast_dtype=trainer.dtype,
            )
        if iteration == 0 and len(trainer.eval_loader) <= 1:
            check_validation(plan, counts.images)
        keep(
            SweepRecord(
                iteration=iteration,
                lr=lr,
                momentum=momentum,
                loss=loss,
                val_loss=counts.loss,
                top1=counts.top1,
                top5=math.nan if counts.top5 is None else counts.top5,
            )
        )
        any_finite = any_finite or math.isfinite(loss)
    return "finished" if any_finite else "not finite"


def agreed(trainer: Trainer, loss: Tensor) -> tuple[float, bool]:
    """Return the mean loss over all processes, and whether any of them was asked to stop."""
    own = torch.stack([loss, torch.full_like(loss, trainer.stop_requested)]).double()
    # Waits for the device: the next update depends on it.
    total, stops = all_reduce_sum(own, trainer.world, "the sum of the losses").tolist()
    return total / trainer.world.world_size, stops > 0


def endless(loader: Loader, stage_at: Callable[[int], object]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches over the ends of epochs, all of the stage that the loader is in.

    Where the next epoch belongs to another stage, the loader returns to the first epoch of this
    one. A loader without batches yields nothing.
    """
    stage = stage_at(loader.epoch)
    first = next(epoch for epoch in count() if stage_at(epoch) == stage)
    while len(loader):
        yield from loader
        if stage_at(loader.epoch) != stage:
            loader.epoch = first


class SweepRecorder(Recorder):
    """Record sweeps: one bar over all their iterations on a terminal, else a line for each."""

    def record(
        self, index: int, weight_decay: float, clock: Stopwatch, record: SweepRecord
    ) -> None:
        """Write one iteration of sweep `index` (from 0); `step` counts the updates of the sweep."""
        row = {"step": record.iteration, "epoch": 0, "time_seconds": sum(clock.read().values())}
        self._write("sweep", row | {"sweep": index, "weight_decay": weight_decay} | asdict(record))
        if self._bar is not None:
            text = f"lr {record.lr:.2e}, loss {record.loss:.3f}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def end_of_sweep(self, index: int, num_sweeps: int, done: Sweep) -> None:
        """Print how sweep `index` (from 0) ended; move the bar to the start of the next."""
        self._print(
            f"sweep {index + 1} of {num_sweeps}: weight decay {plain(done.weight_decay)}, "
            f"momentum {plain(done.momentum, 4)}: {done.outcome}"
        )
        if self._bar is not None and done.ended != "stopped":
            self._bar.update((index + 1) * done.num_it - self._bar.n)


class NullSweepRecorder(NullRecorder, SweepRecorder):
    """Record nothing, on the processes other than rank 0."""
