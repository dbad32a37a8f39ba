"""Fused SGD: torch's own, or that of NVIDIA apex where it is installed."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from fastimagenet.model import param_groups
from pipelines.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastimagenet.recipes import Recipe

BACKENDS = ("torch", "apex")
_REMEDY = "build NVIDIA apex from https://github.com/NVIDIA/apex or take --optimizer-backend torch"


def make_optimizer(model: nn.Module, recipe: Recipe, backend: str) -> torch.optim.Optimizer:
    """SGD over the model's parameters; LR and momentum are set at every step by the trainer.

    Raises UserError where `backend` "apex" cannot be had.
    """
    import torch

    if recipe.decay_bn_and_bias:
        groups = [{"params": list(model.parameters()), "weight_decay": recipe.weight_decay}]
    else:
        groups = param_groups(model, recipe.weight_decay)
    # Momentum must not be 0 here: nesterov refuses that, and the schedule sets it anyway.
    if backend == "apex":
        fused_sgd: type[torch.optim.SGD] = _apex_fused_sgd()
        try:
            return fused_sgd(groups, lr=0.1, momentum=0.9, nesterov=recipe.nesterov)
        except RuntimeError as error:  # built without its CUDA extensions
            raise UserError(f"--optimizer-backend apex: {error}; {_REMEDY}") from None
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=recipe.nesterov, fused=True)
    for parameter in model.parameters():
        # Left to itself, a first step that the fp16 scaler skips would leave unset memory here.
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def _apex_fused_sgd() -> Any:
    try:
        return import_module("apex.optimizers").FusedSGD
    except (ImportError, AttributeError):
        raise UserError(f"--optimizer-backend apex: {_why_no_apex()}") from None


def _why_no_apex() -> str:
    try:
        found = metadata.metadata("apex")
    except metadata.PackageNotFoundError:
        return f"NVIDIA apex is not installed; {_REMEDY}"
    return (
        f"the installed package apex {found['Version']} ({found['Summary']}) is another one, from "
        f"PyPI; pip uninstall apex, then {_REMEDY}"
    )
