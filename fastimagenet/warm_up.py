"""Compilation of the training step, and its warm-up before the clock starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fastimagenet.faults import out_of_memory_advice
from pipelines.errors import UserError

if TYPE_CHECKING:
    from fastimagenet.recipes import Recipe
    from fastimagenet.trainer import Trainer

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
        shapes = {(p.phase.image_size, p.phase.batch_size): p for p in trainer.plan.phases[::-1]}
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
