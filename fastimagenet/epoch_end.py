"""What follows an epoch's last update: its evaluation, over all processes, and its row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastimagenet.distributed import all_reduce_sum, broadcast
from fastimagenet.evaluation import Counts, evaluate
from fastimagenet.recorder import EpochRecord, train_seconds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastimagenet.plan import PlannedPhase
    from fastimagenet.trainer import Trainer


def evaluate_epoch(trainer: Trainer, phase: PlannedPhase) -> dict[str, float | None]:
    """The row's fields of an evaluation of all validation images; none where the plan has none.

    The last evaluation of the run has the TTA, too, and the accuracies on squares where the phase
    is evaluated on rectangles.
    """
    if not trainer.plan.evaluates(trainer.epoch):
        return {}
    recipe, last = trainer.plan.recipe, trainer.epoch + 1 == trainer.plan.epochs

    def counted(tta: str) -> Counts:
        return counts_of(
            trainer, trainer.evaluated_model, trainer.eval_loader, phase.eval_size, tta
        )

    with trainer.clock.section("evaluation"):
        counts = counted(recipe.tta if last else "none")
        if not last and trainer.stop_at_target and recipe.reached_by(counts.accuracies()):
            last = True
            counts = counts if recipe.tta == "none" else counted(recipe.tta)
        fields: dict[str, float | None] = {"val_loss": counts.loss, **counts.accuracies()}
        if last and phase.phase.rect:
            squares = counted("none")
            fields |= {"square_top1": squares.top1, "square_top5": squares.top5}
    return fields


def counts_of(
    trainer: Trainer,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    image_size: int,
    tta: str = "none",
) -> Counts:
    """Exact counts over all processes, each with validation `batches` of its own.

    Raises UserError where the device's memory does not hold a batch.
    """
    from fastimagenet.faults import out_of_memory_advice

    smallest = trainer.plan.smallest_phase
    # BN statistics are local to a process; those of the first are saved, and judged.
    broadcast(model.buffers(), trainer.world, "the BN statistics")
    with out_of_memory_advice(smallest.phase.batch_size, image_size, smallest.index):
        counts = evaluate(
            model, batches, device=trainer.device, autocast_dtype=trainer.dtype, tta=tta
        )
    total = all_reduce_sum(counts.tensor().to(trainer.device), trainer.world, "validation counts")
    return Counts.from_tensor(total)


def epoch_record(
    trainer: Trainer,
    phase: PlannedPhase,
    images_per_sec: float,
    evaluated: dict[str, float | None],
) -> EpochRecord:
    """The row of the epoch that is over; the training loss is the mean over all processes."""
    losses = all_reduce_sum(trainer.losses.total.clone(), trainer.world, "the epoch's losses")
    total = losses.item()  # the epoch is over: nothing is kept waiting
    seconds = trainer.clock.read()
    return EpochRecord(
        step=trainer.step,
        epoch=trainer.epoch,
        time_seconds=sum(seconds.values()),
        train_seconds=train_seconds(seconds),
        eval_seconds=seconds["evaluation"],
        data_wait_seconds=seconds["data_wait"],
        image_size=phase.phase.image_size,
        batch_size=phase.phase.batch_size,
        images_per_sec=images_per_sec,
        train_loss=total / (phase.steps_per_epoch * trainer.world.world_size),
        **evaluated,
    )
