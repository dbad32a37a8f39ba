"""Compilation before the clock starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastimagenet.faults import out_of_memory_advice

if TYPE_CHECKING:
    from fastimagenet.trainer import Trainer


def warm_up(trainer: Trainer) -> None:
    """Compile the training step for every size of the plan, leaving the model as it was."""
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
            with out_of_memory_advice(batch_size, image_size, planned.index):
                trainer.forward_backward(images, labels)
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.model.load_state_dict(before)
        trainer.synchronize()
        if trainer.communication is not None:
            trainer.communication.take_seconds()  # it belongs to the warm-up
