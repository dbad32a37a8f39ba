"""The moving average of the weights, kept on the device without waiting for it."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """torch's average of parameters and buffers: d x old + (1 - d) x new, first a copy.

    After n updates d is (1 + n) / (10 + n), up to `decay`: a short run would otherwise be evaluated
    near its start.

    torch's own `update_parameters` (still in 2.14) copies its counter to the GPU at every update,
    which waits for all work queued there.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average in the model's current weights; integer buffers are copied."""
        first = not self.n_averaged  # the counter is on the CPU
        copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
        for old, new in zip(tensors(self.module), tensors(model), strict=True):
            kind = copied if first or not old.is_floating_point() else averaged
            kind[0].append(old.detach())
            kind[1].append(new.detach())
        # A launch for each of a ResNet's counters would take as long as a part of the step.
        if copied[0]:
            torch._foreach_copy_(*copied)
        if averaged[0]:
            count = int(self.n_averaged)
            torch._foreach_lerp_(*averaged, 1 - min(self.decay, (1 + count) / (10 + count)))
        self.n_averaged += 1


def tensors(model: nn.Module) -> chain[Tensor]:
    """Iterate over the parameters, then the buffers."""
    return chain(model.parameters(), model.buffers())
