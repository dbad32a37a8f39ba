"""SGD, AdamW or Muon over parameter groups, each with its own LR, weight decay and epochs."""

from __future__ import annotations

from importlib import import_module, metadata
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from fastimagenet.models.parts import layer_groups
from fastimagenet.models.speednet import WhiteningConv2d
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.training.evaluation import autocast_dtype
from pipelines.errors import UserError

Settings = dict[str, Any]
"""The entries of a parameter group but for its parameters."""
ADAM_BETA2 = 0.99
"""Beside a beta1 that the schedule cycles, as fast.ai trained with in "AdamW and Super-convergence
is now the fastest way to train neural nets" (July 2018); torch's .999 remembers too long for runs
of a few hundred updates."""
_REMEDY = "build NVIDIA apex from https://github.com/NVIDIA/apex or take --optimizer-backend torch"


def make_optimizer(model: nn.Module, recipe: Recipe, backend: str) -> torch.optim.Optimizer:
    """Make the recipe's optimizer; `set_rates` gives it LR and momentum at every step.

    Raises UserError where apex is asked for and not installed.
    """
    groups = param_groups(model, recipe)
    optimizer: torch.optim.Optimizer
    # Momentum must not be 0 here: nesterov refuses that, and the schedule sets it anyway.
    if backend == "apex":
        if recipe.optimizer != "sgd":
            raise UserError(f"--optimizer-backend apex has no {recipe.optimizer}: take torch")
        fused_sgd: type[torch.optim.SGD] = _apex_fused_sgd()
        try:
            return fused_sgd(groups, lr=0.1, momentum=0.9, nesterov=recipe.nesterov)
        except RuntimeError as error:  # built without its CUDA extensions
            raise UserError(f"--optimizer-backend apex: {error}; {_REMEDY}") from None
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.1, betas=(0.9, ADAM_BETA2), fused=True)
    if recipe.optimizer == "muon":
        device = next(model.parameters()).device.type
        dtype = autocast_dtype(recipe.precision, device) and torch.bfloat16
        optimizer = Muon(groups, nesterov=recipe.nesterov, dtype=dtype or torch.float32)
    else:
        optimizer = torch.optim.SGD(
            groups, lr=0.1, momentum=0.9, nesterov=recipe.nesterov, fused=True
        )
    for group in groups:
        for parameter in group["params"]:
            # Left to itself, a first step that the fp16 scaler skips would leave unset memory here.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float, epoch: int) -> None:
    """Set every group's share of the plan's LR, and the momentum unless it has its own.

    AdamW's momentum is its beta1, as fast.ai cycled it in 2018.
    """
    for group in optimizer.param_groups:
        learns = group.get("frozen_epochs", 0) <= epoch < group.get("epochs", inf)
        factor = group.get("lr_factor", 1.0) * group.get("layer_factor", 1.0)
        group["lr"] = lr * factor if learns else 0.0
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = group.get("own_momentum", momentum)


def forget_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Set what the optimizer remembers of the layers that were frozen back to its beginning.

    Their gradients came while they could not follow.
    """
    for group in optimizer.param_groups:
        if group.get("frozen_epochs"):
            for parameter in group["params"]:
                for value in optimizer.state[parameter].values():
                    value.zero_()


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Group the parameters that learn by how they are treated, in the model's order.

    Besides torch's entries a group has "decays", whatever the decay, and may have "muon" and those
    that `set_rates` reads: "lr_factor", "epochs" (it stops learning after as many),
    "own_momentum" and, of the recipe's layer groups, "layer", "layer_factor" and "frozen_epochs"
    (it begins to learn after as many). Parameters of at most one dimension, which are BN's and
    biases, do not decay unless the recipe says so, and then by the same amount an update as all
    others, however high their LR.
    """
    layers: dict[nn.Parameter, int] = {}
    if recipe.num_layer_groups > 1:
        layers = layer_groups(model, recipe.num_layer_groups)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                settings = _settings(module, name, parameter, recipe)
                if layers:
                    settings |= _layer_settings(layers[parameter], recipe)
                group = groups.setdefault(tuple(settings.items()), {"params": [], **settings})
                group["params"].append(parameter)
    return list(groups.values())


def _settings(module: nn.Module, name: str, parameter: nn.Parameter, recipe: Recipe) -> Settings:
    """Return the entries of the group that a module's parameter belongs to."""
    if recipe.optimizer == "muon" and parameter.ndim == 4:
        lr_factor, momentum = recipe.muon
        rates = {"lr_factor": lr_factor, "own_momentum": momentum}
        # Their norm is held, so that a decay would do nothing.
        return {"decays": False, "weight_decay": 0.0, "muon": True, **rates}
    decays = parameter.ndim > 1 or recipe.decay_bn_and_bias
    decay = recipe.weight_decay if decays else 0.0
    settings: Settings = {"decays": decays, "weight_decay": decay}
    whitens = isinstance(module, WhiteningConv2d)
    raised = whitens or isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
    if name == "bias" and raised and recipe.bias_lr_factor != 1:
        settings["lr_factor"] = recipe.bias_lr_factor
        settings["weight_decay"] /= recipe.bias_lr_factor
    if whitens:
        settings["epochs"] = recipe.whitening_bias_epochs
    return settings


def _layer_settings(layer: int, recipe: Recipe) -> Settings:
    """Return the entries that the parameters of a layer group have beside the others."""
    factors = recipe.layer_factors(recipe.frozen_epochs)
    settings: Settings = {"layer": layer, "layer_factor": factors[layer]}
    if layer + 1 < len(factors):
        settings["frozen_epochs"] = recipe.frozen_epochs
    return settings


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


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""The coefficients of Jordan's quintic iteration."""
NEWTON_SCHULZ_STEPS = 3
"""The record holders take 3 for speed; Jordan's page has 5."""


class Muon(torch.optim.SGD):
    """SGD, but for groups with `"muon": True`, whose 4-D parameters are updated by Muon.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix
    by the nearest orthogonal one: see `orthogonal`, of which `dtype` is the precision. A filter
    bank is taken as a matrix (filters, height x width x channels). Before each update it is
    scaled to the Frobenius norm sqrt(filters), as in airbench94_muon: BN behind it makes that
    invisible, and the LR is then a share of the weights; weight decay would do nothing.

    torch.optim.Muon takes 2-D parameters only, and bf16 whatever the run's precision: on a
    processor that has none, ResNet-18's largest bank then takes hundreds of times as long.
    Groups, state and `state_dict` are SGD's: a bank's momentum is kept under the parameter.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, nesterov: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(groups, lr=0.1, momentum=0.9, nesterov=nesterov)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters once; the gradients of the filters are consumed."""
        for group in self.param_groups:
            if group.get("muon"):
                for bank in group["params"]:
                    self._update_filters(bank, group)
                    bank.grad = None  # SGD passes over what has none
        super().step()

    def _update_filters(self, bank: Tensor, group: dict[str, Any]) -> None:
        """Update one filter bank; a frozen one, whose LR is 0, stays as it is."""
        lr, momentum = group["lr"], group["momentum"]
        if lr:
            bank.mul_(len(bank) ** 0.5 / bank.norm())
        if bank.grad is None:
            return
        average = self.state[bank]["momentum_buffer"].lerp_(bank.grad, 1 - momentum)
        if lr:
            update = bank.grad.lerp(average, momentum) if group["nesterov"] else average
            matrix = as_matrix(bank)
            rows, columns = matrix.shape
            # Jordan's factor, by which a tall matrix moves as far as a wide one.
            step = lr * max(1, rows / columns) ** 0.5
            update = update.contiguous(memory_format=torch.channels_last)
            matrix.add_(orthogonal(as_matrix(update), self.dtype), alpha=-step)


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U V^T of the matrix's SVD, in `dtype`, by Newton-Schulz iterations.

    Each iteration multiplies the matrix by a polynomial of its Gram matrix. These commute, so that
    the Gram matrix alone is iterated, in float32, and the matrix multiplied once by the product:
    half the work for ResNet-18's banks, which are nine times as wide as they are high.
    """
    wide = len(matrix) <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    gram = (x @ x.T).float()
    factor = product = _polynomial(gram)
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        gram = factor @ gram @ factor
        factor = _polynomial(gram)
        product = factor @ product
    x = product.to(dtype) @ x
    return x if wide else x.T


def _polynomial(gram: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    result = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result


def as_matrix(filters: Tensor) -> Tensor:
    """View (filters, channels, H, W), channels_last, as (filters, H x W x channels)."""
    return filters.permute(0, 2, 3, 1).view(len(filters), -1)
