"""The learning-rate finder: a training with a rising LR that leaves no trace but its curve.

Importing this module does not import torch, so that the package itself can offer `lr_find2`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import TYPE_CHECKING

from fastimagenet.distributed.collectives import all_reduce_sum
from fastimagenet.lr_finder.analysis import (
    DebiasedAverage,
    DivergenceRule,
    Ended,
    Sweep,
    SweepRecord,
    sweep_lr,
)
from pipelines.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fastimagenet.recipes.plan import Plan
    from fastimagenet.training.trainer import Trainer
    from pipelines.loader import Loader


def lr_find2(
    trainer: Trainer,
    start_lr: float = 1e-5,
    end_lr: float = 10,
    num_it: int = 100,
    wds: float | None = None,
    linear: bool = False,
    stop_dv: bool = True,
    *,
    momentum: float | None = None,
    on_record: Callable[[SweepRecord], None] | None = None,
) -> Sweep:
    """Train `num_it` updates with a LR that rises from start_lr to end_lr; restore everything.

    What fastai 0.7 offered under this name. Each update is followed by an evaluation of the next
    validation batch. `wds`: the weight decay in place of the recipe's. `linear`: the LR rises
    linearly, not exponentially. `stop_dv`: end early, before the record of that batch, once the
    smoothed loss is not finite or above 4 x its best. `momentum`, by default what the plan has
    where its LR peaks: the LR found has to live with that one. `on_record` is called after every
    recorded iteration, on every process. `trainer.stop_requested` ends the sweep, too.

    All processes have to call it and get the same Sweep. It begins at the trainer's place in the
    plan and stays in that phase, over the ends of epochs. The trainer, its model, optimizer,
    loaders and torch's random numbers are left bit for bit as they were, whatever happens; the
    seconds go into the clock's section "other".
    Each iteration is judged on one validation batch: give the trainer a validation loader that
    mixes the classes, since folders are listed by class (the command shuffles).
    Raises UserError for an argument out of range, named as the command's flag, for a validation
    set smaller than a batch, and for what an update can raise.
    """
    check_sweep(start_lr, end_lr, num_it, wds, momentum)
    plan = trainer.plan
    weight_decay = plan.recipe.weight_decay if wds is None else wds
    if momentum is None:
        momentum = plan.momentum(plan.peak_step)
    rates = (sweep_lr(iteration, start_lr, end_lr, num_it, linear) for iteration in range(num_it))
    records: list[SweepRecord] = []

    def keep(record: SweepRecord) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    with restored(trainer):
        for group in trainer.optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = weight_decay / group.get("lr_factor", 1.0)
        ended = run(trainer, rates, momentum, stop_dv, keep)
    return Sweep(
        weight_decay=weight_decay,
        momentum=momentum,
        num_it=num_it,
        linear=linear,
        records=tuple(records),
        ended=ended,
    )


def check_sweep(
    start_lr: float, end_lr: float, num_it: int, wds: float | None, momentum: float | None
) -> None:
    """Raise UserError for an argument of `lr_find2` that is out of range."""
    if not 0 < start_lr < math.inf:
        raise UserError(f"--start-lr must be above 0, not {start_lr:g}")
    if not start_lr < end_lr < math.inf:
        raise UserError(f"--end-lr must be above --start-lr, {start_lr:g}, not {end_lr:g}")
    if num_it < 1:
        raise UserError(f"--num-it must be at least 1, not {num_it}")
    if wds is not None and not 0 <= wds < math.inf:
        raise UserError(f"--wd must be 0 or more, not {wds:g}")
    if momentum is not None and not 0 <= momentum < 1:
        raise UserError(f"--momentum must be in [0, 1), not {momentum:g}")


def check_validation(plan: Plan, num_val: int) -> None:
    """Raise UserError if the validation images do not fill a batch of every process."""
    smallest = plan.smallest_phase
    batch_size = smallest.batch_size
    if num_val < batch_size * plan.world_size:
        processes = f" on each of {plan.world_size} processes" if plan.world_size > 1 else ""
        raise UserError(
            f"a validation set of {num_val} images is smaller than one batch of "
            f"{batch_size}{processes}: --set phases.{smallest.index}.batch_size="
            f"{max(1, num_val // plan.world_size)} or less"
        )


@contextmanager
def restored(trainer: Trainer) -> Iterator[None]:
    """Run the block in the clock's section "other"; then all is as it was, whatever happened."""
    with trainer.clock.section("other"):
        before = copy.deepcopy(trainer.state_dict())
        modes = {module: module.training for module in trainer.model.modules()}
        scaler, communication = trainer.scaler, trainer.communication
        try:
            # An update that is broken off leaves marks in these two: the block gets its own.
            trainer.scaler, trainer.communication = copy.deepcopy(scaler), None
            yield
        finally:
            trainer.scaler, trainer.communication = scaler, communication
            trainer.load_state_dict(before)
            trainer.optimizer.zero_grad(set_to_none=True)
            for module, training in modes.items():
                module.training = training


def run(
    trainer: Trainer,
    rates: Iterator[float],
    momentum: float,
    stop_dv: bool,
    keep: Callable[[SweepRecord], None],
) -> Ended:
    """The updates and evaluations of a sweep; each record goes to `keep`."""
    from fastimagenet.training.evaluation import evaluate
    from fastimagenet.training.failures import out_of_memory_advice

    plan = trainer.plan
    stages = plan.eval_stages()
    phase = plan.phase_of_epoch(trainer.train_loader.epoch)
    image_size = stages[min(trainer.eval_loader.epoch, len(stages) - 1)].image_size
    train_batches = endless(trainer.train_loader, plan.phase_of_epoch)
    updates = zip(*[train_batches] * plan.accumulation, strict=False)
    val_batches = endless(trainer.eval_loader, lambda e: stages[min(e, len(stages) - 1)])
    average, rule, any_finite = DebiasedAverage(), DivergenceRule(), False
    trainer.model.train()
    for iteration, (lr, batches) in enumerate(zip(rates, updates, strict=False)):
        loss, stop = agreed(trainer, trainer.update(batches, lr, momentum, phase))
        loss = average.update(loss)
        if stop:
            return "stopped"
        if stop_dv and (verdict := rule.verdict(iteration, loss)):
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
                top5=counts.top5,
            )
        )
        any_finite = any_finite or math.isfinite(loss)
    return "finished" if any_finite else "not finite"


def agreed(trainer: Trainer, loss: Tensor) -> tuple[float, bool]:
    """The mean loss over all processes, and whether any of them was asked to stop."""
    import torch

    own = torch.stack([loss, torch.full_like(loss, trainer.stop_requested)]).double()
    # Waits for the device: the next update depends on it.
    total, stops = all_reduce_sum(own, trainer.world, "the sum of the losses").tolist()
    return total / trainer.world.world_size, stops > 0


def endless(loader: Loader, stage_at: Callable[[int], object]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch after batch over the ends of epochs, all of the stage that the loader is in.

    Where the next epoch is of another stage, it goes back to the first of this one. Nothing
    from a loader without batches.
    """
    stage = stage_at(loader.epoch)
    first = next(epoch for epoch in count() if stage_at(epoch) == stage)
    while len(loader):
        yield from loader
        if stage_at(loader.epoch) != stage:
            loader.epoch = first
