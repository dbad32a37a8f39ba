"""The moving average of the weights, kept on the device without waiting for it."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """torch's average of parameters and buffers: old x decay + new x (1 - decay), first a copy.

    torch's own `update_parameters` sends its counter to the GPU at every update, and waits for all
    work queued there before.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's present weights in; counts among its buffers are copied."""
        first = not self.n_averaged  # the counter is on the CPU
        floats: tuple[list[Tensor], list[Tensor]] = ([], [])
        for old, new in zip(tensors(self.module), tensors(model), strict=True):
            if first or not old.is_floating_point():
                old.copy_(new)
            else:
                floats[0].append(old)
                floats[1].append(new)
        if not first:
            torch._foreach_lerp_(*floats, 1 - self.decay)
        self.n_averaged += 1


def tensors(model: nn.Module) -> chain[Tensor]:
    """Parameters, then buffers."""
    return chain(model.parameters(), model.buffers())
