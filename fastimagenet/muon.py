"""torch's Muon for filters, SGD for all else, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STEPS = 3
"""Newton-Schulz iterations; the record holders take 3 for speed, torch's default is 5."""


class Muon(torch.optim.SGD):
    """SGD but for the groups with `"muon": True`, whose 4-D parameters go by `torch.optim.Muon`.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix
    by the nearest orthogonal one, found by Newton-Schulz iterations in bf16. torch's takes 2-D
    parameters only: here it gets each filter bank as a matrix (filters, height x width x channels)
    over the very memory of the parameter, which is channels_last. Before each update the bank is
    scaled to the Frobenius norm sqrt(filters), as in airbench94_muon: BN behind it makes that
    invisible, and the LR is then a share of the weights; weight decay would do nothing.

    Groups, state and `state_dict` are SGD's: a bank's momentum is kept under the parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], *, nesterov: bool) -> None:
        super().__init__(groups, lr=0.1, momentum=0.9, nesterov=nesterov)
        self.matrices = {
            bank: nn.Parameter(as_matrix(bank.detach()))
            for group in self.filter_groups
            for bank in group["params"]
        }
        matrices = [
            {"params": [self.matrices[bank] for bank in group["params"]]}
            for group in self.filter_groups
        ]
        self.inner = torch.optim.Muon(matrices, weight_decay=0.0, ns_steps=STEPS)

    @property
    def filter_groups(self) -> list[dict[str, Any]]:
        """Those that Muon updates."""
        return [group for group in self.param_groups if group.get("muon")]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients of all parameters; those of the filters are consumed."""
        for group, inner in zip(self.filter_groups, self.inner.param_groups, strict=True):
            inner["lr"], inner["momentum"] = group["lr"], group["momentum"]
            for bank in group["params"]:
                matrix, momentum = self.matrices[bank], self.state[bank]["momentum_buffer"]
                # A loaded state has brought another buffer.
                self.inner.state[matrix] = {"momentum_buffer": as_matrix(momentum)}
                if bank.grad is not None:
                    gradient = bank.grad.contiguous(memory_format=torch.channels_last)
                    matrix.grad = as_matrix(gradient)
                bank.mul_(len(bank) ** 0.5 / bank.norm())
                bank.grad = None  # SGD passes over what has none
        self.inner.step()
        self.inner.zero_grad()
        super().step()


def as_matrix(filters: Tensor) -> Tensor:
    """(filters, channels, H, W), channels_last, as a view (filters, H x W x channels)."""
    return filters.permute(0, 2, 3, 1).view(len(filters), -1)
