"""The training loop: fit -> train_epoch -> train_step, in a straight line.

Nothing here waits for the device but the log steps, the end of an epoch and the evaluation.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastimagenet.distributed.collectives import (
    all_reduce_sum,
    any_process,
    gather_objects,
)
from fastimagenet.distributed.world import World, launched_before
from fastimagenet.errors import Stopped
from fastimagenet.recipes import toml
from fastimagenet.recipes.plan import Plan, PlannedPhase
from fastimagenet.training import checkpoint
from fastimagenet.training.average import MovingAverage
from fastimagenet.training.checkpoint import CheckpointWriter
from fastimagenet.training.clock import Stopwatch, train_seconds
from fastimagenet.training.evaluation import Counts, evaluate
from fastimagenet.training.failures import (
    SCALER_PATIENCE_STEPS,
    LossMonitor,
    out_of_memory_advice,
)
from fastimagenet.training.optimizer import forget_frozen
from fastimagenet.training.profiling import StepProfiler
from fastimagenet.training.recorder import (
    EpochRecord,
    NullRecorder,
    Recorder,
    StepRecord,
    best_record,
)
from fastimagenet.training.resuming import (
    check_same_run,
    find_checkpoint,
    plan_changes,
    rounding_note,
)
from fastimagenet.training.updates import MicroBatches, Updates
from pipelines.errors import UserError
from pipelines.loader import Loader

LOG_EVERY_STEPS = 10
SAVE_AFTER_SECONDS = 10.0
"""An evaluation that takes longer begins with a checkpoint of what was trained before it. The end
of a shorter one saves soon enough: 15 MB take .11 s of a core of an AMD EPYC (2026-11-29)."""


class Trainer(Updates):
    """Trains `model` as `plan` says, on the device of `world`.

    The loaders yield images (B, 3, S, S), channels_last, and labels on that device: (B,) int64, or
    (B, classes) float32 for a recipe that mixes images. `fit` closes them. With a `folder`, the
    first process saves checkpoints in `folder`/checkpoints: at the end of every epoch and every
    `checkpoint_steps` updates (0: only at the ends of epochs), with the plain values `about`, which
    tell this run from others when it is resumed. DDP all-reduces the gradients in buckets of
    `bucket_mb` MiB. `class_weights`, (classes,), weigh the training loss. Raises UserError for what
    the user can mend: memory, precision, a diverging loss.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        train_loader: Loader,
        eval_loader: Loader,
        *,
        world: World = World(),  # noqa: B008
        recorder: Recorder | None = None,
        clock: Stopwatch | None = None,
        folder: Path | None = None,
        about: dict[str, Any] | None = None,
        optimizer_backend: str = "torch",
        checkpoint_steps: int = 0,
        bucket_mb: float = 25,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(
            plan,
            model,
            world=world,
            clock=clock or Stopwatch(),
            optimizer_backend=optimizer_backend,
            bucket_mb=bucket_mb,
            class_weights=class_weights,
        )
        recipe = plan.recipe
        self.recorder = recorder or NullRecorder()
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.folder, self.checkpoint_steps = folder, checkpoint_steps
        facts = {"recipe": toml.dumps(recipe), "num_train": plan.num_train}
        self.about: dict[str, Any] = {"classes": [], "seed": 0} | facts | (about or {})
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S")
        """When the run began, however often it was resumed since."""
        self.writer: CheckpointWriter | None = None
        if folder is not None and world.is_main:
            self.writer = CheckpointWriter(folder / "checkpoints", self.recorder)
        self.ema = MovingAverage(self.model, recipe.ema_decay) if recipe.ema_decay else None
        self.profiler: StepProfiler | None = None
        self.records: list[EpochRecord] = []
        self.plan_changes = ""
        """How the plan differs from that of the checkpoint resumed from, for the user."""
        self._note = ""
        """What else to say of the resume."""
        self.stop_requested = self.stop_at_target = False
        self._logged = (0, 0.0)
        """Step and training clock, in seconds, of the last log row."""
        self._began = (0, 0.0)
        """The same where this epoch began, or was resumed."""
        self._save_at = 0.0
        """When the state before the evaluation in progress is saved, by time.monotonic."""
        self._rate_before = 0.0
        """Images/s of this epoch before it was resumed."""
        self._unsaved: dict[str, Any] | None = None
        """The state before the evaluation in progress, which changes nothing of it, as long as no
        checkpoint has been begun."""
        patience_steps = SCALER_PATIENCE_STEPS if self.scaler.is_enabled() else 1
        self.losses = LossMonitor(self.device, patience_steps)

    def fit(self) -> None:
        """Train from the current step to the end of the plan.

        Compiles first what is not compiled yet. Raises Stopped once a requested stop is saved.
        """
        if not self._all_sizes_compiled:
            self.compile_all_sizes()
        epoch_step = round(self.plan.step_at(self.epoch))
        self.recorder.start(self.step, self.records, epoch_step)
        if self.step:
            self._record_event(f"resumed{self.plan_changes}", self._note)
        self.clock.switch("compute")
        try:
            while not self.finished:
                self.train_epoch()
        finally:
            if self.profiler is not None:
                self.profiler.close()
            self.train_loader.close()
            self.eval_loader.close()
            self._finish_save()
            self.recorder.close()
            self.clock.switch("other")

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.epoch == self.plan.epochs or (
            self.stop_at_target
            and bool(self.records)
            and self.plan.recipe.reached_by(vars(self.records[-1]))
        )

    def train_epoch(self) -> None:
        """Train what is left of the current epoch, evaluate, and begin to save a checkpoint."""
        phase = self.plan.phase_of_epoch(self.epoch)
        end_step = phase.first_step + (self.epoch + 1 - phase.first_epoch) * phase.steps_per_epoch
        self._began = self._logged = self.step, train_seconds(self.clock.read())
        self._check_loader(phase)
        self._train_module.train()
        batches = self.clock.waiting(self.train_loader, "data_wait", self.busy)
        for micro_batches in zip(*[batches] * self.plan.accumulation, strict=True):
            loss = self.train_step(micro_batches, phase)
            if self.profiler is not None:
                self.profiler.step()
            last = self.step == end_step
            if self.step % LOG_EVERY_STEPS == 0 or last:
                self._log(loss, phase)
            self._stop_if_requested()
            if last and self.plan.evaluates(self.epoch):
                with self.clock.section("checkpoint"):
                    self._unsaved = self.state_dict()
            elif not last and self.checkpoint_steps and self.step % self.checkpoint_steps == 0:
                self.losses.read(loss, self.plan)  # weights that have diverged are not worth saving
                self._save()
        self.synchronize()
        images_per_sec = self._images_per_sec()
        try:
            evaluated = self.evaluate_epoch(phase)
        except Stopped:
            self._save_unsaved()
            self._stop()
        self._unsaved = None
        record = self._epoch_record(phase, images_per_sec, evaluated)
        self.records.append(record)
        self.recorder.epoch(record)
        self.epoch += 1
        self.losses.total.zero_()
        best = best_record(self.records, self.plan.recipe) is record
        self._save(checkpoint.EPOCH, *((checkpoint.BEST,) if best else ()))

    def _check_loader(self, phase: PlannedPhase) -> None:
        """Raise UserError where the training loader's epochs are not those of the plan."""
        found, planned = len(self.train_loader), phase.steps_per_epoch * self.plan.accumulation
        if found != planned:
            raise UserError(
                f"the training loader gives {found} batches in epoch {self.epoch + 1} and the plan "
                f"has {planned}: open it with the plan's phases and number of images"
            )

    def train_step(self, micro_batches: MicroBatches, phase: PlannedPhase) -> Tensor:
        """Make the plan's next update; returns this process's mean loss, a scalar on the device."""
        lr, momentum = self.plan.lr(self.step), self.plan.momentum(self.step)
        frozen = self.plan.recipe.frozen_epochs
        if frozen and self.step == round(self.plan.step_at(frozen)):
            forget_frozen(self.optimizer)
        loss = self.update(micro_batches, lr, momentum, phase)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.losses.update(loss, self.step)
        self.step += 1
        return loss

    def evaluate_epoch(self, phase: PlannedPhase) -> dict[str, float | None]:
        """Evaluate on all validation images; returns the epoch row's fields.

        There are none in an epoch that the plan does not evaluate. The run's last evaluation
        applies the recipe's TTA and, after one on rectangles in the last phase, is repeated on
        squares, which the plan has a pass of its own for.
        """
        if not self.plan.evaluates(self.epoch):
            return {}
        recipe, last = self.plan.recipe, self.epoch + 1 == self.plan.epochs
        loader, own_pass = self.eval_loader, self.eval_loader.epoch
        self._save_at = time.monotonic() + SAVE_AFTER_SECONDS
        with self.clock.section("evaluation"):
            counts = self.evaluate(recipe.tta if last else "none")
            if not last and self.stop_at_target and recipe.reached_by(counts.accuracies()):
                last = True
                if recipe.tta != "none":
                    loader.epoch = own_pass
                    counts = self.evaluate(recipe.tta)
            fields: dict[str, float | None] = {"val_loss": counts.loss, **counts.accuracies()}
            if last and phase.rect and phase == self.plan.phases[-1]:
                loader.epoch = len(self.plan.eval_stages()) - 1
                squares = self.evaluate()
                fields |= {"square_top1": squares.top1, "square_top5": squares.top5}
                loader.epoch = own_pass + 1  # where a run that is resumed past its target goes on
        return fields

    def evaluate(self, tta: str = "none") -> Counts:
        """Evaluate `evaluated_model` over the next pass of the validation loader.

        Returns exact counts over all processes, each of which has to call it.
        """
        image_size = self.plan.phase_of_epoch(self.epoch).eval_size
        with out_of_memory_advice(self.plan.smallest_phase, image_size):
            return evaluate(
                self.evaluated_model,
                self.eval_loader,
                world=self.world,
                autocast_dtype=self.dtype,
                tta=tta,
                classes=len(self.about["classes"]),
                stopping=self._stopping,
            )

    def _stopping(self) -> bool:
        """Tell whether this process was asked to stop; save before a long evaluation goes on."""
        if time.monotonic() >= self._save_at:
            self._save_unsaved()
        return self.stop_requested

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights where the recipe keeps them; never the compiled module, so that a
        smaller last batch costs no compilation."""
        return self.model if self.ema is None else self.ema.module

    def _log(self, loss: Tensor, phase: PlannedPhase) -> None:
        """Record a step row. Raises UserError if the loss has diverged."""
        value = self.losses.read(loss, self.plan)
        if self.communication is not None:
            self.clock.move("compute", "communication", self.communication.take_seconds())
        seconds = self.clock.read()
        logged_step, logged_seconds = self._logged
        self._logged = self.step, train_seconds(seconds)
        images = (self.step - logged_step) * phase.global_batch
        self.recorder.step(
            StepRecord(
                step=self.step,
                epoch=self.epoch,
                time_seconds=sum(seconds.values()),
                lr=self.plan.lr(self.step - 1),
                momentum=self.plan.momentum(self.step - 1),
                loss=value,
                images_per_sec=images / max(self._logged[1] - logged_seconds, 1e-9),
            )
        )

    def _epoch_record(
        self, phase: PlannedPhase, images_per_sec: float, evaluated: dict[str, float | None]
    ) -> EpochRecord:
        """Return the finished epoch's row; its training loss is the mean over all processes."""
        losses = all_reduce_sum(self.losses.total.clone(), self.world, "the epoch's losses")
        total = losses.item()  # waits for the device; the epoch is over
        seconds = self.clock.read()
        return EpochRecord(
            step=self.step,
            epoch=self.epoch,
            time_seconds=sum(seconds.values()),
            train_seconds=train_seconds(seconds),
            eval_seconds=seconds["evaluation"],
            data_wait_seconds=seconds["data_wait"],
            image_size=phase.image_size,
            batch_size=phase.batch_size,
            images_per_sec=images_per_sec,
            peak_memory_bytes=self._peak_memory(),
            train_loss=total / (phase.steps_per_epoch * self.world.world_size),
            **evaluated,
        )

    def _images_per_sec(self) -> float:
        """Rate of this epoch's updates that were made here; that of the checkpoint without any."""
        step, seconds = self._began
        if self.step == step:
            return self._rate_before
        images = (self.step - step) * self.plan.phase_of_epoch(self.epoch).global_batch
        return images / (train_seconds(self.clock.read()) - seconds)

    def _peak_memory(self) -> int | None:
        """Return the most bytes that tensors took of the GPU since the last call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        peak: int = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def _record_event(self, message: str, note: str = "") -> None:
        self.recorder.event(
            step=self.step,
            epoch=self.epoch,
            time_seconds=sum(self.clock.read().values()),
            message=f"{message} at step {self.step}{note}",
        )

    def _stop_if_requested(self) -> None:
        """Save and raise Stopped. Several processes agree on it, at log steps only."""
        if self.world.world_size > 1 and self.step % LOG_EVERY_STEPS:
            return
        if any_process(self.stop_requested, self.world, f"the check at step {self.step}"):
            self._save()
            self._stop()

    def _stop(self) -> NoReturn:
        """Raise Stopped once the checkpoint begun last is on the disk."""
        if self._finish_save():
            self._record_event("stopped and saved")
        raise Stopped

    def _save(self, *names: str) -> None:
        """Begin to save a checkpoint as last.pt and under `names`."""
        with self.clock.section("checkpoint"):
            state = self.state_dict()
            if self.writer is not None:
                self.writer.save(state, names)

    def _save_unsaved(self) -> None:
        """Begin to save the state before the evaluation, unless that has been done."""
        state, self._unsaved = self._unsaved, None
        if state is not None and self.writer is not None:
            with self.clock.section("checkpoint"):
                self.writer.save(state)

    def _finish_save(self) -> bool:
        """Wait for the checkpoint begun last; False where it could not be written."""
        with self.clock.section("checkpoint"):
            return self.writer is None or self.writer.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, tensors and plain values.

        Every process has to call it.
        """
        on_gpu = self.device.type == "cuda"
        rank_state = {
            "loader": self.train_loader.state_dict(),
            "eval_loader": self.eval_loader.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "loss_total": self.losses.total.item(),  # waits for the device, as the copy to come
        }
        return {
            **self.about,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "accumulation": self.plan.accumulation,
            "step": self.step,
            "epoch": self.epoch,
            "records": [vars(record) for record in self.records],
            "clock": self.clock.read(),
            "saved_at": time.time(),
            "started": self.started,
            "threads": self.threads,
            "deterministic": self.deterministic,
            "images_per_sec": self._images_per_sec(),
            "ranks": gather_objects(rank_state, self.world, f"the save at step {self.step}"),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`, except for the clock, which only moves forward.

        Raises UserError for another model and, in mid-epoch, for another number of processes or of
        micro-batches an update.
        """
        changes = plan_changes(self.plan, state)
        try:
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--resume: the checkpoint is of another recipe: {reason}") from None
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.plan_changes = state["step"], state["epoch"], changes
        if changes:
            self.step = round(self.plan.step_at(self.epoch))
        self.records = [EpochRecord(**record) for record in state["records"]]
        self._rate_before = state.get("images_per_sec", 0.0)  # earlier releases had none
        ranks = state["ranks"]
        rank_state = ranks[self.world.rank % len(ranks)]
        self.train_loader.load_state_dict(rank_state["loader"])
        self.eval_loader.load_state_dict(rank_state["eval_loader"])
        self.losses.total.fill_(rank_state["loss_total"])
        torch.set_rng_state(rank_state["torch_rng"])
        cuda_rng = rank_state.get("cuda_rng")
        if self.device.type == "cuda" and cuda_rng is not None:  # None: the run began on a CPU
            torch.cuda.set_rng_state(cuda_rng, self.device)

    def resume(self, source: str, *, elastic: bool = False) -> None:
        """Restore the checkpoint at the path `source`; "auto": the newest in the run's folder.

        With "auto" and no checkpoint there, the run starts from its beginning. `elastic`: where
        the number of processes has changed in mid-epoch, that epoch starts again.
        Raises UserError for a checkpoint of another run and for one that not all nodes see.
        """
        found = find_checkpoint(source, self.folder, self.plan, self.world, elastic)
        if found is None:
            return
        path, state = found
        check_same_run(path, state, self.about | {"recipe": self.plan.recipe})
        self.load_state_dict(state)
        # A run that its launcher restarts is still the same one: its clock ran on since the save.
        saved_at = state["saved_at"]
        lost_seconds = max(0.0, time.time() - saved_at) if launched_before(saved_at) else None
        self.clock.carry_over(state["clock"], lost_seconds)
        # Releases before had no such entries.
        self.started = state.get("started", self.started)
        self._note = rounding_note(state, self.threads, self.deterministic)
        if self.folder is not None and self.world.is_main:
            checkpoint.adopt(self.folder / "checkpoints", path, state["epoch"])
