"""The training loop: fit -> train_epoch -> train_step, in a straight line.

The only place of DistributedDataParallel, and with `evaluation` of autocast. Nothing here waits for
the device but the log steps, the end of an epoch and the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fastimagenet import checkpoint
from fastimagenet.average import MovingAverage
from fastimagenet.checkpoint_writer import CheckpointWriter
from fastimagenet.communication import CommunicationTimer, synchronised
from fastimagenet.distributed import World, any_process
from fastimagenet.epoch_end import epoch_record, evaluate_epoch
from fastimagenet.faults import SCALER_PATIENCE_STEPS, LossWatch, out_of_memory_advice
from fastimagenet.optimizer import make_optimizer, set_rates
from fastimagenet.peers import exchanging
from fastimagenet.plan import Plan, PlannedPhase
from fastimagenet.precision import autocast_dtype
from fastimagenet.profiling import StepProfiler
from fastimagenet.recorder import (
    EpochRecord,
    Recorder,
    StepRecord,
    Stopwatch,
    best_record,
    train_seconds,
)
from fastimagenet.resume import state_of
from fastimagenet.warm_up import compiled, graph_safe_gradients, warm_up
from pipelines.loader import Loader

LOG_EVERY_STEPS = 10
Update = tuple[tuple[Tensor, Tensor], ...]
"""The batches of a process that make one update."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class Trainer:
    """Trains `model` as `plan` says, on the device of `world`.

    `make_loader(training)` gives the loaders, which yield images (B, 3, S, S) channels_last and
    labels on that device: (B,) int64, or (B, classes) float32 for a recipe that mixes images. With
    a `folder`, the first process leaves checkpoints there, at the ends of epochs and every
    `checkpoint_steps` updates (0: not in mid-epoch), with the plain values `about` in them.
    Several processes exchange their gradients `bucket_mb` MiB at a time.
    Raises UserError for what the user can mend: memory, precision, a diverging loss.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        world: World,
        make_loader: Callable[[bool], Loader],
        recorder: Recorder,
        *,
        clock: Stopwatch | None = None,
        folder: Path | None = None,
        about: dict[str, Any] | None = None,
        optimizer_backend: str = "torch",
        checkpoint_steps: int = 0,
        bucket_mb: float = 25,
    ) -> None:
        recipe = plan.recipe
        self.plan, self.world, self.recorder = plan, world, recorder
        self.about, self.checkpoint_steps = about or {}, checkpoint_steps
        self.writer: CheckpointWriter | None = None
        if folder is not None and world.is_main:
            self.writer = CheckpointWriter(folder / "checkpoints", recorder)
        self.train_loader, self.eval_loader = make_loader(True), make_loader(False)
        self.clock = clock or Stopwatch()
        self.device = torch.device(world.device)
        self.dtype = autocast_dtype(recipe.precision, self.device.type)
        if recipe.sync_bn:
            model = synchronised(model, self.device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, recipe, optimizer_backend)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = MovingAverage(self.model, recipe.ema_decay) if recipe.ema_decay else None
        self.profiler: StepProfiler | None = None
        self.communication: CommunicationTimer | None = None
        self._ddp: DistributedDataParallel | None = None
        self.step = 0
        """Updates done."""
        self.epoch = 0
        """The epoch in progress, from 0."""
        self.records: list[EpochRecord] = []
        self.changed = ""
        """What is not as it was before a resume, for the user."""
        self.stop_requested = self.stop_at_target = False
        patience_steps = SCALER_PATIENCE_STEPS if self.scaler.is_enabled() else 1
        self.losses = LossWatch(self.device, patience_steps)
        self.trained = self._wrapped(bucket_mb)
        torch.backends.cudnn.benchmark = True

    def _wrapped(self, bucket_mb: float) -> nn.Module:
        """The module that the training step calls: the model, distributed and compiled."""
        module: nn.Module = self.model
        if self.world.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            with exchanging("the comparison of the models", self.world):
                module = self._ddp = DistributedDataParallel(
                    module,
                    device_ids=devices,
                    bucket_cap_mb=bucket_mb,
                    gradient_as_bucket_view=True,
                    static_graph=self.plan.accumulation == 1,
                )
            self.communication = CommunicationTimer(self._ddp, self.plan.recipe.bf16_gradients)
        return compiled(module, self.plan.recipe, self.device)

    def fit(self) -> None:
        """Train from the present step to the plan's end. Raises Stopped after a saved stop."""
        if self.plan.recipe.compile:
            warm_up(self)
        self.recorder.start(self.step, self.records, renumbered=bool(self.changed))
        if self.step:
            self._record_event(f"resumed{self.changed}")
        self.clock.switch("compute")
        try:
            while not self.over:
                self.train_epoch()
        finally:
            if self.profiler is not None:
                self.profiler.close()
            self.train_loader.close()
            self.eval_loader.close()
            self._saved()
            self.recorder.close()
            self.clock.switch("other")

    @property
    def over(self) -> bool:
        """Whether nothing is left to train."""
        return self.epoch == self.plan.epochs or (
            self.stop_at_target
            and bool(self.records)
            and self.plan.recipe.reached_by(vars(self.records[-1]))
        )

    def train_epoch(self) -> None:
        """What is left of the present epoch, its evaluation and its checkpoint."""
        phase = self.plan.phase_of_epoch(self.epoch)
        first_step = phase.first_step + (self.epoch - phase.first_epoch) * phase.steps_per_epoch
        epoch_start, logged_step = train_seconds(self.clock.read()), self.step
        logged_at, start_step = epoch_start, self.step
        self.trained.train()
        batches = self.clock.waiting(self.train_loader, "data_wait")
        for update in zip(*[batches] * self.plan.accumulation, strict=True):
            loss = self.train_step(update, phase)
            if self.profiler is not None:
                self.profiler.step()
            last = self.step == first_step + phase.steps_per_epoch
            if self.step % LOG_EVERY_STEPS == 0 or last:
                now = self._log(loss, phase, logged_step, logged_at)
                logged_step, logged_at = self.step, now
            self._stop_if_asked()
            if not last and self.checkpoint_steps and self.step % self.checkpoint_steps == 0:
                self.losses.read(loss, self.plan)  # what has diverged is not worth keeping
                self._save()
        self.synchronize()
        seconds = train_seconds(self.clock.read()) - epoch_start
        # Of the updates made here: after a resume in mid-epoch there are fewer, or none.
        rate = (self.step - start_step) * phase.global_batch / seconds
        record = epoch_record(self, phase, rate, evaluate_epoch(self, phase))
        self.records.append(record)
        self.recorder.epoch(record)
        self.epoch += 1
        self.losses.total.zero_()
        best = best_record(self.records, self.plan.recipe) is record
        self._save(checkpoint.EPOCH, *((checkpoint.BEST,) if best else ()))

    def train_step(self, batches: Update, phase: PlannedPhase) -> Tensor:
        """The plan's next update; the loss of this process's batches, a scalar, on the device."""
        lr, momentum = self.plan.lr(self.step), self.plan.momentum(self.step)
        loss = self.update(batches, lr, momentum, phase)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.losses.update(loss, self.step)
        self.step += 1
        return loss

    def update(self, batches: Update, lr: float, momentum: float, phase: PlannedPhase) -> Tensor:
        """One update of the weights at these rates; the loss as `train_step` gives it."""
        set_rates(self.optimizer, lr, momentum, self.epoch)
        with out_of_memory_advice(phase.phase.batch_size, phase.phase.image_size, phase.index):
            with exchanging(f"the gradients of step {self.step}", self.world):
                loss = self._add_gradients(batches)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _add_gradients(self, batches: Update) -> Tensor:
        """Of the mean loss over the batches; the last one has them exchanged."""
        total = torch.zeros((), device=self.device)
        if self.plan.recipe.cuda_graphs and len(batches) > 1:
            graph_safe_gradients(self.model)
        for images, labels in batches[:-1]:
            with self._ddp.no_sync() if self._ddp is not None else nullcontext():
                total += self.forward_backward(images, labels, 1 / len(batches))
        return total + self.forward_backward(*batches[-1], 1 / len(batches))

    def forward_backward(self, images: Tensor, labels: Tensor, share: float = 1) -> Tensor:
        """Add this share of the gradients of the mean loss over a batch; returns that share."""
        smoothing = self.plan.recipe.label_smoothing
        with self._autocast():
            logits = self.trained(images)
        loss = cross_entropy(logits.float(), labels, label_smoothing=smoothing) * share
        self.scaler.scale(loss).backward()
        if self.communication is not None:
            self.communication.after_backward()
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def _log(self, loss: Tensor, phase: PlannedPhase, logged_step: int, logged_at: float) -> float:
        """A step row; returns the reading of the training clock."""
        value = self.losses.read(loss, self.plan)
        if self.communication is not None:
            self.clock.move("compute", "communication", self.communication.take_seconds())
        seconds = self.clock.read()
        now = train_seconds(seconds)
        images = (self.step - logged_step) * phase.global_batch
        self.recorder.step(
            StepRecord(
                step=self.step,
                epoch=self.epoch,
                time_seconds=sum(seconds.values()),
                lr=self.plan.lr(self.step - 1),
                momentum=self.plan.momentum(self.step - 1),
                loss=value,
                images_per_sec=images / max(now - logged_at, 1e-9),
            )
        )
        return now

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights where the recipe keeps them; never the compiled module, so that a
        ragged last batch costs no compilation."""
        return self.model if self.ema is None else self.ema.module

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _stop_if_asked(self) -> None:
        """Save and raise Stopped. Several processes agree on it at log steps, all at once."""
        alone = self.world.world_size == 1
        if not alone and self.step % LOG_EVERY_STEPS:
            return
        if any_process(self.stop_requested, self.world, f"the check at step {self.step}"):
            self._save()
            if self._saved():
                self._record_event("stopped and saved")
            raise Stopped

    def _record_event(self, message: str) -> None:
        self.recorder.event(
            step=self.step,
            epoch=self.epoch,
            time_seconds=sum(self.clock.read().values()),
            message=f"{message} at step {self.step}",
        )

    def _save(self, *names: str) -> None:
        """Begin to leave a checkpoint as last.pt and under `names`."""
        with self.clock.section("checkpoint"):
            state = state_of(self)
            if self.writer is not None:
                self.writer.save(state, names)

    def _saved(self) -> bool:
        """Wait for the checkpoint begun last; False where the disk did not take it."""
        with self.clock.section("checkpoint"):
            return self.writer is None or self.writer.finish()
