"""The training loop: fit -> train_epoch -> train_step, in a straight line.

The only place of DistributedDataParallel, and with `evaluation` of autocast. Nothing here waits for
the device but the log steps, the end of an epoch and the evaluation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fastimagenet.distributed.collectives import (
    all_reduce_sum,
    any_process,
    broadcast,
    exchanging,
    gather_objects,
)
from fastimagenet.distributed.world import World, launched_before
from fastimagenet.errors import Stopped
from fastimagenet.recipes.plan import Plan, PlannedPhase
from fastimagenet.training import checkpoint
from fastimagenet.training.average import MovingAverage
from fastimagenet.training.checkpoint import CheckpointWriter
from fastimagenet.training.clock import Stopwatch, train_seconds
from fastimagenet.training.ddp import CommunicationTimer, synchronised
from fastimagenet.training.evaluation import Counts, autocast_dtype, evaluate
from fastimagenet.training.failures import SCALER_PATIENCE_STEPS, LossWatch, out_of_memory_advice
from fastimagenet.training.optimizer import make_optimizer, set_rates
from fastimagenet.training.profiling import StepProfiler
from fastimagenet.training.recorder import EpochRecord, Recorder, StepRecord, best_record
from pipelines.errors import UserError
from pipelines.loader import Loader

if TYPE_CHECKING:
    from fastimagenet.recipes.recipe import Recipe


LOG_EVERY_STEPS = 10
Update = tuple[tuple[Tensor, Tensor], ...]
"""The batches of a process that make one update."""


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
        with out_of_memory_advice(phase.batch_size, phase.image_size, phase.index):
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


GRAPH_PASSES = 3
"""torch's CUDA graph trees run a function as it is, then record it, then replay it."""


def compiled(module: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """The module as the recipe has it run. Raises UserError for CUDA graphs on a CPU."""
    if recipe.cuda_graphs and device.type == "cpu":
        raise UserError(
            "recipe field cuda_graphs = true needs a GPU: --set cuda_graphs=false on a CPU"
        )
    if not recipe.compile:
        return module
    mode = "reduce-overhead" if recipe.cuda_graphs else None
    return torch.compile(module, dynamic=False, mode=mode)  # type: ignore[return-value]


def graph_safe_gradients(model: nn.Module) -> None:
    """Zeros that the gradients of several batches are added to.

    The gradients that a CUDA graph gives are in its own memory, which its next pass overwrites.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def warm_up(trainer: Trainer) -> None:
    """Compile the training step for every size of the plan, leaving the model as it was."""
    passes = GRAPH_PASSES if trainer.plan.recipe.cuda_graphs else 1
    with trainer.clock.section("compile"):
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.trained.train()
        # The first phase of each shape; later ones find it compiled.
        shapes = {(p.image_size, p.batch_size): p for p in trainer.plan.phases[::-1]}
        for (image_size, batch_size), planned in shapes.items():
            images = torch.zeros(batch_size, 3, image_size, image_size, device=trainer.device)
            images = images.to(memory_format=torch.channels_last)
            if trainer.device.type == "cuda" and trainer.dtype is not None:
                images = images.half()
            # Of any kind, since the loss is not compiled.
            labels = torch.zeros(batch_size, dtype=torch.int64, device=trainer.device)
            for _ in range(passes):
                with out_of_memory_advice(batch_size, image_size, planned.index):
                    trainer.forward_backward(images, labels)
                trainer.optimizer.zero_grad(set_to_none=True)
        trainer.model.load_state_dict(before)
        trainer.synchronize()
        if trainer.communication is not None:
            trainer.communication.take_seconds()  # it belongs to the warm-up


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
        if last and phase.rect:
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
    from fastimagenet.training.failures import out_of_memory_advice

    smallest = trainer.plan.smallest_phase
    # BN statistics are local to a process; those of the first are saved, and judged.
    broadcast(model.buffers(), trainer.world, "the BN statistics")
    with out_of_memory_advice(smallest.batch_size, image_size, smallest.index):
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
        image_size=phase.image_size,
        batch_size=phase.batch_size,
        images_per_sec=images_per_sec,
        train_loss=total / (phase.steps_per_epoch * trainer.world.world_size),
        **evaluated,
    )


ENTRIES = (
    *("recipe", "classes", "num_train", "seed", "model", "ranks", "accumulation", "clock"),
    "saved_at",
)
"""What a checkpoint that a run goes on from holds at least."""


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that the run needs to go on: tensors and plain values. Every process has to ask."""
    on_gpu = trainer.device.type == "cuda"
    rank_state = {
        "loader": trainer.train_loader.state_dict(),
        "eval_loader": trainer.eval_loader.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if on_gpu else None,
        "loss_total": trainer.losses.total.item(),
    }
    return {
        **trainer.about,
        "model": trainer.model.state_dict(),
        "ema": None if trainer.ema is None else trainer.ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "accumulation": trainer.plan.accumulation,
        "step": trainer.step,
        "epoch": trainer.epoch,
        "records": [vars(record) for record in trainer.records],
        "clock": trainer.clock.read(),
        "saved_at": time.time(),
        "ranks": gather_objects(rank_state, trainer.world, f"the save at step {trainer.step}"),
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Go to where `state_of` was taken, but for the clock, which knows no way back.

    Raises UserError for another model, and in mid-epoch for another number of processes or
    batches an update.
    """
    world, ranks = trainer.world, state["ranks"]
    changed = changes(trainer, state)
    if changed and in_mid_epoch(state):
        raise UserError(
            f"--resume: the checkpoint was saved in mid-epoch{changed}: go on from the end of the "
            f"epoch before, --resume DIR/checkpoints/{checkpoint.EPOCH}, or as it was"
        )
    try:
        trainer.model.load_state_dict(state["model"])
        if trainer.ema is not None:
            trainer.ema.load_state_dict(state["ema"])
        trainer.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--resume: the checkpoint is of another recipe: {reason}") from None
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.epoch, trainer.changed = state["step"], state["epoch"], changed
    if changed:
        trainer.step = round(trainer.plan.step_at(trainer.epoch))
    trainer.records = [EpochRecord(**record) for record in state["records"]]
    rank_state = ranks[world.rank % len(ranks)]
    trainer.train_loader.load_state_dict(rank_state["loader"])
    trainer.eval_loader.load_state_dict(rank_state["eval_loader"])
    trainer.losses.total.fill_(rank_state["loss_total"])
    torch.set_rng_state(rank_state["torch_rng"])
    cuda_rng = rank_state.get("cuda_rng")
    if trainer.device.type == "cuda" and cuda_rng is not None:  # None: the run began on a CPU
        torch.cuda.set_rng_state(cuda_rng, trainer.device)


def in_mid_epoch(state: dict[str, Any]) -> bool:
    """Whether batches of an epoch have been read that is not over."""
    return bool(state["ranks"][0]["loader"]["step"])


def changes(trainer: Trainer, state: dict[str, Any]) -> str:
    """How the plan differs from that of the checkpoint: ", 2 processes before, ..."; or "".

    The processes and the batches of an update may differ, and with them the global batch and,
    by the recipe's rule, the LR.
    """
    plan, processes, accumulation = trainer.plan, len(state["ranks"]), state["accumulation"]
    if (processes, accumulation) == (plan.world_size, plan.accumulation):
        return ""
    first = plan.recipe.phases[0].batch_size
    before = Plan.of(plan.recipe, processes, plan.num_train, first * processes * accumulation)
    epoch = min(state["epoch"], plan.epochs - 1)
    numbers = [
        (p.world_size, p.phase_of_epoch(epoch).global_batch, p.lr(round(p.step_at(epoch))))
        for p in (before, plan)
    ]
    names = ("processes", "global batch", "lr")
    pairs = zip(names, *numbers, strict=True)
    return "".join(f", {name} {old:g} -> {new:g}" for name, old, new in pairs)


def newest_intact(trainer: Trainer, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The last checkpoint or, with a word about it, the one before, or that of the epoch's end.

    Raises UserError naming the last one where none is intact.
    """
    damage: UserError | None = None
    for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.EPOCH):
        path = folder / name
        try:
            state = checkpoint.load(path, *ENTRIES)
        except UserError as error:
            damage = damage or error
            continue
        if damage is not None and trainer.world.is_main:
            print(f"note: {damage}; going on from {path}", file=sys.stderr)  # noqa: T201
        return path, state
    assert damage is not None
    raise damage


def resume(trainer: Trainer, output: Path, flag: str, *, elastic: bool = False) -> None:
    """Restore from the checkpoint that --resume names; "auto": from the one in `output`, if any.

    `elastic`: where the number of processes has changed in mid-epoch, the epoch begins anew.

    Raises UserError for a checkpoint of another run and for one that not all nodes see.
    """
    if flag == "auto":
        folder = output / "checkpoints"
        found = gather_objects((folder / checkpoint.LAST).exists(), trainer.world, "a check")
        if not any(found):
            return
        if not all(found):
            raise UserError(f"--output {output} must be a folder that all nodes see")
        path, state = newest_intact(trainer, folder)
        if elastic and changes(trainer, state) and in_mid_epoch(state):
            path = folder / checkpoint.EPOCH
            if not path.exists():
                return
            state = checkpoint.load(path, *ENTRIES)
    else:
        path = Path(flag)
        state = checkpoint.load(path, *ENTRIES)
    remedies = {
        "recipe": "another recipe: give the --recipe, --set, --epochs and --precision that it "
        "began with",
        "classes": "other classes: name the --data that it began with",
        "num_train": f"{state['num_train']} training images: name the --data and --skip-list that "
        "it began with",
        "seed": f"another seed: --seed {state['seed']}",
    }
    for name, remedy in remedies.items():
        if state[name] != trainer.about[name]:
            raise UserError(f"--resume: {path} is of a run with {remedy}")
    restore(trainer, state)
    # After a fault the run itself goes on: what was lost since the checkpoint is a part of it.
    saved_at = state["saved_at"]
    lost = max(0.0, time.time() - saved_at) if launched_before(saved_at) else None
    trainer.clock.carry_over(state["clock"], lost)
    if trainer.world.is_main:
        adopt(output / "checkpoints", path, state["epoch"])


def adopt(folder: Path, path: Path, epochs: int) -> None:
    """Give the run's new folder the checkpoint that it goes on from, after so many epochs, and the
    best one until then: its rows and its summary speak of them."""
    if path.parent.resolve() == folder.resolve():
        return
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.link(path, folder / checkpoint.LAST)
    best = path.with_name(checkpoint.BEST)
    if best.exists() and checkpoint.load(best, "epoch")["epoch"] <= epochs:
        checkpoint.link(best, folder / checkpoint.BEST)
