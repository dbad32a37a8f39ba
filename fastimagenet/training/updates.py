"""One update of a network's weights: forward and backward passes, all-reduce, optimizer.

Nothing here knows of data or files, and an update does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fastimagenet.distributed.collectives import collective
from fastimagenet.distributed.world import World
from fastimagenet.recipes.plan import Plan, PlannedPhase
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.ddp import CommunicationTimer, synchronised
from fastimagenet.training.evaluation import autocast_dtype
from fastimagenet.training.failures import (
    check_single_images,
    compile_advice,
    out_of_memory_advice,
)
from fastimagenet.training.optimizer import make_optimizer, set_rates
from pipelines.errors import UserError

GRAPH_PASSES = 3
"""torch's CUDA graph trees run a function eagerly, then record it, then replay it."""
MicroBatches = tuple[tuple[Tensor, Tensor], ...]
"""The batches of one process that make one update."""


class Updates:
    """The weights of `model` and what updates them as the plan's recipe says: see `Trainer`."""

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        *,
        world: World,
        clock: Stopwatch,
        optimizer_backend: str,
        bucket_mb: float,
        class_weights: Tensor | None,
    ) -> None:
        recipe = plan.recipe
        self.plan, self.world, self.clock = plan, world, clock
        self.device = torch.device(world.device)
        self.dtype = autocast_dtype(recipe.precision, self.device.type)
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        check_single_images(model, plan.phases)
        if recipe.sync_bn:
            model = synchronised(model, self.device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, recipe, optimizer_backend)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.communication: CommunicationTimer | None = None
        self.step = 0
        """Number of updates done."""
        self.epoch = 0
        """Index of the current epoch, from 0."""
        self._ddp = self._distributed(bucket_mb) if world.world_size > 1 else None
        self._train_module = compiled(self._ddp or self.model, recipe, self.device)
        self._all_sizes_compiled = not recipe.compile
        """So that `fit` need not do it within the training clock."""
        self._updated = torch.cuda.Event() if self.device.type == "cuda" else None
        """Over when the GPU has done all that the last update queued."""
        torch.backends.cudnn.benchmark = not self.deterministic

    def _distributed(self, bucket_mb: float) -> DistributedDataParallel:
        """Wrap the model in DDP and time what it waits for."""
        with collective("the comparison of the models", self.world):
            module = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                bucket_cap_mb=bucket_mb,
                gradient_as_bucket_view=True,
                static_graph=self.plan.accumulation == 1,
            )
        self.communication = CommunicationTimer(module, self.plan.recipe.bf16_gradients)
        return module

    @property
    def precision(self) -> str:
        """The precision in which the model runs, as --precision has it."""
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def deterministic(self) -> bool:
        """Whether torch takes only algorithms that repeat themselves bit for bit."""
        return torch.are_deterministic_algorithms_enabled()

    @property
    def threads(self) -> int | None:
        """CPU threads, by whose number sums differ in their last bits; None on a GPU."""
        return torch.get_num_threads() if self.device.type == "cpu" else None

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def update(
        self, micro_batches: MicroBatches, lr: float, momentum: float, phase: PlannedPhase
    ) -> Tensor:
        """Update the weights once at these rates; returns the loss as `train_step` does."""
        set_rates(self.optimizer, lr, momentum, self.epoch)
        clip = self.plan.recipe.clip_grad_norm
        with out_of_memory_advice(phase, phase.image_size):
            with collective(f"the gradients of step {self.step}", self.world):
                loss = self._accumulate_gradients(micro_batches)
            if clip:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._updated is not None:
            self._updated.record()
        return loss

    def busy(self) -> bool:
        """Tell whether a GPU is still at the last update, without waiting for it.

        A CPU, which queues nothing, never is.
        """
        return self._updated is not None and not self._updated.query()

    def _accumulate_gradients(self, micro_batches: MicroBatches) -> Tensor:
        """Accumulate the gradients of the mean loss over the micro-batches.

        DDP all-reduces them on the last one.
        """
        total, share = torch.zeros((), device=self.device), 1 / len(micro_batches)
        if self.plan.recipe.cuda_graphs and len(micro_batches) > 1:
            # The gradients that a CUDA graph returns are in memory that its next pass overwrites.
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        for images, labels in micro_batches[:-1]:
            with self._ddp.no_sync() if self._ddp is not None else nullcontext():
                total += self.forward_backward(images, labels, share)
        return total + self.forward_backward(*micro_batches[-1], share)

    def forward_backward(self, images: Tensor, labels: Tensor, share: float = 1) -> Tensor:
        """Add `share` times the gradients of a batch's mean loss; returns `share` x that loss."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self._train_module(images)
        loss = self.loss(logits.float(), labels) * share
        self.scaler.scale(loss).backward()
        if self.communication is not None:
            self.communication.after_backward()
        return loss.detach()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the training loss of logits (B, classes), a scalar: the mean over the batch.

        With class weights it is their weighted sum divided by B, not by the sum of the weights as
        torch's mean is: so the mean over micro-batches and processes is that of their images.
        """
        smoothing, weights = self.plan.recipe.label_smoothing, self.class_weights
        if weights is None:
            return cross_entropy(logits, labels, label_smoothing=smoothing)
        total = cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)
        return total / len(logits)

    def compile_all_sizes(self, phases: Sequence[PlannedPhase] = ()) -> None:
        """Compile the training step for every batch shape of the plan; the model stays as it was.

        `phases`: of these only. Nothing to do but time where the recipe does not compile.
        """
        passes = GRAPH_PASSES if self.plan.recipe.cuda_graphs else 1
        with self.clock.section("compile"):
            before = {name: value.clone() for name, value in self.model.state_dict().items()}
            self._train_module.train()
            # The first phase of each shape; later ones find it compiled.
            shapes = {(p.image_size, p.batch_size): p for p in (phases or self.plan.phases)[::-1]}
            for (size, batch_size), phase in shapes.items():
                half = self.device.type == "cuda" and self.dtype is not None
                with compile_advice(), out_of_memory_advice(phase, size):
                    images = torch.empty(
                        (batch_size, 3, size, size),
                        dtype=torch.float16 if half else torch.float32,
                        device=self.device,
                        memory_format=torch.channels_last,
                    ).zero_()
                    # Labels of either kind will do, since the loss is not compiled.
                    labels = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
                    for _ in range(passes):
                        self.forward_backward(images, labels)
                        self.optimizer.zero_grad(set_to_none=True)
            self.model.load_state_dict(before)
            self.synchronize()
            if self.communication is not None:
                self.communication.take_seconds()  # these were spent compiling
        self._all_sizes_compiled |= not phases


def compiled(module: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """Compile the module if the recipe says so. Raises UserError for CUDA graphs on a CPU."""
    if recipe.cuda_graphs and device.type == "cpu":
        raise UserError(
            "recipe field cuda_graphs = true needs a GPU: --set cuda_graphs=false on a CPU"
        )
    if not recipe.compile:
        return module
    # Above it torch would run a size that comes late uncompiled, without a word.
    shapes = {(phase.image_size, phase.batch_size) for phase in recipe.phases}
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(shapes) + 2)
    mode = "reduce-overhead" if recipe.cuda_graphs else None
    return torch.compile(module, dynamic=False, mode=mode)  # type: ignore[return-value]
