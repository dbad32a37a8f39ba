"""The one place of derivation: from a recipe, a world size and a data set to steps and rates."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from fastimagenet.recipes import schedule
from fastimagenet.recipes.recipe import Phase, Recipe
from pipelines.errors import UserError
from pipelines.loader import Stage, train_steps


@dataclass(frozen=True, kw_only=True)
class PlannedPhase(Phase):
    """A phase with its place in the run; epochs and steps count from 0 over the whole run."""

    index: int
    """Its index in the recipe."""
    first_epoch: int
    first_step: int
    steps_per_epoch: int
    global_batch: int
    lr_factor: float
    """What the recipe's LR is multiplied by for this global batch."""

    @property
    def last_step(self) -> int:
        """Index of the first step after the phase."""
        return self.first_step + self.epochs * self.steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do, step by step. Made by `Plan.of`, printed and stored with the run."""

    recipe: Recipe
    world_size: int
    num_train: int
    accumulation: int
    """Micro-batches of a process whose gradients make one update."""
    phases: tuple[PlannedPhase, ...]

    @classmethod
    def of(
        cls, recipe: Recipe, world_size: int, num_train: int, global_batch: int | None = None
    ) -> Plan:
        """Derive steps, global batch and LR; `global_batch` is that of the first phase.

        Raises UserError where a phase's global batch is larger than the training set, or where the
        schedule cannot be laid over the steps.
        """
        accumulation = accumulation_for(recipe, world_size, global_batch)
        num_shards = world_size * accumulation
        planned: list[PlannedPhase] = []
        epoch = step = 0
        for index, phase in enumerate(recipe.phases):
            steps_per_epoch = train_steps(num_train, phase.batch_size, num_shards)
            if not steps_per_epoch and accumulation > 1:
                largest = max(each.batch_size for each in recipe.phases)
                first = recipe.phases[0].batch_size * world_size
                most = max(1, num_train // (largest * world_size)) * first
                raise UserError(
                    f"--global-batch {global_batch} makes updates of "
                    f"{phase.batch_size * num_shards} images in phases.{index}, more than the "
                    f"{num_train} training images: --global-batch {most} or less"
                )
            if not steps_per_epoch:
                # What fits every phase: their batches would be refused one by one.
                fits = f"--set phases.*.batch_size={num_train // num_shards} or less"
                if num_train < 2 * num_shards:  # BN takes no single image, or not of any size
                    fits = "take fewer processes" if world_size > 1 else "there are too few"
                raise UserError(
                    f"recipe field phases.{index}.batch_size = {phase.batch_size} x {num_shards} "
                    f"processes is more than the {num_train} training images: {fits}"
                )
            reference, images = recipe.lr_reference_batch, phase.batch_size * num_shards
            planned.append(
                PlannedPhase(
                    **vars(phase) | {"eval_size": phase.eval_size or phase.image_size},
                    index=index,
                    first_epoch=epoch,
                    first_step=step,
                    steps_per_epoch=steps_per_epoch,
                    global_batch=images,
                    lr_factor=images / reference if reference else 1.0,
                )
            )
            epoch += phase.epochs
            step += phase.epochs * steps_per_epoch
        plan = cls(
            recipe=recipe,
            world_size=world_size,
            num_train=num_train,
            accumulation=accumulation,
            phases=tuple(planned),
        )
        plan.lr(0)
        return plan

    @property
    def epochs(self) -> int:
        return self.recipe.epochs

    @property
    def total_steps(self) -> int:
        return self.phases[-1].last_step

    @cached_property
    def _schedules(self) -> tuple[schedule.Schedule, schedule.Schedule]:
        """LR for the recipe's own batch, and momentum, by the step. Raises UserError."""
        recipe, steps = self.recipe, self.total_steps
        momentum: schedule.Schedule | None = None
        lr: schedule.Schedule
        try:
            if recipe.schedule == "use_clr_beta":
                lr, momentum = schedule.use_clr_beta(steps, recipe.max_lr, *recipe.use_clr_beta)
            elif recipe.schedule == "one_cycle":
                lr, momentum = schedule.one_cycle(steps, recipe.max_lr, *recipe.one_cycle)
            else:
                lr = self._piecewise()
        except ValueError as error:
            raise UserError(f"recipe field {error}") from None
        return lr, momentum or schedule.Constant(recipe.momentum)

    def _piecewise(self) -> schedule.PiecewiseLinear:
        peak = self.recipe.max_lr
        return schedule.PiecewiseLinear(
            tuple(
                (self.step_at(first), self.step_at(last), start * peak, end * peak)
                for first, last, start, end in self.recipe.lr_spans
            )
        )

    @cached_property
    def peak_step(self) -> int:
        """The first update at which the LR is highest."""
        return max(range(self.total_steps), key=self.lr)

    @cached_property
    def smallest_phase(self) -> PlannedPhase:
        """The first phase of the smallest batch, which is that of all evaluations."""
        return min(self.phases, key=lambda planned: planned.batch_size)

    def lr(self, step: int) -> float:
        """Return the learning rate of update `step` (from 0)."""
        return self._schedules[0](step) * self.phase_at(step).lr_factor

    def layer_lrs(self, step: int) -> tuple[float, ...]:
        """Return the LR of each layer group, stem to head, at update `step` (from 0)."""
        planned, lr = self.phase_at(step), self.lr(step)
        epoch = planned.first_epoch + (step - planned.first_step) // planned.steps_per_epoch
        return tuple(lr * factor for factor in self.recipe.layer_factors(epoch))

    def momentum(self, step: int) -> float:
        """Return the momentum of update `step` (from 0)."""
        return self._schedules[1](step)

    def phase_at(self, step: int) -> PlannedPhase:
        """Find the phase of update `step`; past the end, the last one."""
        starts = [phase.first_step for phase in self.phases]
        return self.phases[bisect_right(starts, step) - 1]

    def phase_of_epoch(self, epoch: int) -> PlannedPhase:
        """Find the phase of `epoch` (from 0)."""
        starts = [phase.first_epoch for phase in self.phases]
        return self.phases[bisect_right(starts, epoch) - 1]

    def step_at(self, epoch: float) -> float:
        """Return the step at which `epoch` (from 0, fractions are fine) begins."""
        phase = self.phase_of_epoch(int(epoch))
        return phase.first_step + (epoch - phase.first_epoch) * phase.steps_per_epoch

    def evaluates(self, epoch: int) -> bool:
        """Tell whether the model is evaluated after `epoch`."""
        return (epoch + 1) % self.recipe.eval_every_epochs == 0 or epoch + 1 == self.epochs

    def eval_stages(self) -> tuple[Stage, ...]:
        """List what the validation loader reads, one stage of one epoch for each pass.

        One batch size, the recipe's smallest, so that no pass costs a rebuild. Where the last pass
        reads rectangles, one more reads squares.
        """
        batch_size = self.smallest_phase.batch_size
        phases = [self.phase_of_epoch(e) for e in range(self.epochs) if self.evaluates(e)]
        passes = [(planned.eval_size, planned.rect) for planned in phases]
        if phases[-1].rect:
            passes.append((phases[-1].eval_size, False))
        return tuple(
            Stage(epochs=1, image_size=size, batch_size=batch_size, rect=rect)
            for size, rect in passes
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert the plan to plain values for plan.json."""
        return {
            "recipe": asdict(self.recipe),
            "world_size": self.world_size,
            "num_train": self.num_train,
            "accumulation": self.accumulation,
            "epochs": self.epochs,
            "total_steps": self.total_steps,
            "phases": [self._phase_row(planned) for planned in self.phases],
        }

    def _phase_row(self, planned: PlannedPhase) -> dict[str, Any]:
        last = planned.last_step - 1
        return {
            "first_epoch": planned.first_epoch,
            "epochs": planned.epochs,
            "image_size": planned.image_size,
            "data": planned.data,
            "eval_size": planned.eval_size,
            "rect": planned.rect,
            "batch_size": planned.batch_size,
            "global_batch": planned.global_batch,
            "steps_per_epoch": planned.steps_per_epoch,
            "first_step": planned.first_step,
            "lr_first": self.lr(planned.first_step),
            "lr_last": self.lr(last),
            "momentum_first": self.momentum(planned.first_step),
            "momentum_last": self.momentum(last),
        }

    def describe(self) -> str:
        """Format the plan as a table for the terminal."""
        recipe = self.recipe
        lines = [
            f"plan: recipe {recipe.name}, {recipe.model}, {self.epochs} epochs, "
            f"{self.total_steps:,} steps, {self.num_train:,} training images, "
            f"world size {self.world_size}",
            f"  {'epochs':>9}  {'size':>4}  {'eval':>4}  {'batch':>5}  {'global':>6}  "
            f"{'steps/ep':>8}  {'lr':>22}  {'momentum':>15}",
        ]
        for row in (self._phase_row(planned) for planned in self.phases):
            epochs = f"{row['first_epoch']}-{row['first_epoch'] + row['epochs']}"
            lr = f"{row['lr_first']:.5g} -> {row['lr_last']:.5g}"
            momentum = f"{row['momentum_first']:.3f} -> {row['momentum_last']:.3f}"
            lines.append(
                f"  {epochs:>9}  {row['image_size']:>4}  {row['eval_size']:>4}  "
                f"{row['batch_size']:>5}  {row['global_batch']:>6}  "
                f"{row['steps_per_epoch']:>8}  {lr:>22}  {momentum:>15}"
            )
        for planned in self.phases:
            if planned.copy:
                lines.append(
                    f"  phases.{planned.index} trains on the copies in {planned.copy}; "
                    "validation reads the originals"
                )
            if planned.rect:
                lines.append(f"  phases.{planned.index} is evaluated on rectangles")
        if recipe.pretrained:
            lines.append(f"  starts from pretrained weights: {recipe.pretrained}")
        if recipe.num_layer_groups > 1:
            factors = ", ".join(f"{each:g}" for each in recipe.layer_factors(recipe.frozen_epochs))
            frozen = recipe.frozen_epochs
            for_epochs = f"; all but the last are frozen for {frozen} epochs" if frozen else ""
            lines.append(f"  layer groups, stem to head, learn at lr x {factors}{for_epochs}")
        peak = self.peak_step
        lines.append(f"  peak lr {self.lr(peak):.5g} at step {peak}, schedule {recipe.schedule}")
        if recipe.lr_reference_batch:
            lines.append(
                f"  lr rule: max_lr {recipe.max_lr:g} x global batch / {recipe.lr_reference_batch}"
            )
        if self.accumulation > 1:
            lines.append(
                f"  an update accumulates the gradients of {self.accumulation} micro-batches"
            )
        left_out = self.num_train - self.phases[-1].steps_per_epoch * self.phases[-1].global_batch
        lines.append(f"  left out of a (last) epoch to fill whole batches: {left_out} images")
        return "\n".join(lines)


def accumulation_for(recipe: Recipe, world_size: int, global_batch: int | None) -> int:
    """Compute the micro-batches of an update that give the first phase this global batch.

    Raises UserError for one that the processes cannot make of whole batches.
    """
    first = recipe.phases[0].batch_size
    if global_batch is None:
        return 1
    if global_batch < 1 or global_batch % (first * world_size):
        raise UserError(
            f"--global-batch must be a multiple of {first * world_size}, which is the first "
            f"phase's batch_size {first} x {world_size} processes, not {global_batch}"
        )
    return global_batch // (first * world_size)
