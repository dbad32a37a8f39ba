"""The networks by name, and which of their parameters decay.

Importing this module does not import torch, so that a recipe can be checked without it; the
networks themselves are in `fastimagenet.networks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    from torch import nn

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""torchvision's; they alone have `blur_pool` and `small_stem`."""

MODELS = (*RESNETS, "resnet56", "smallnet")


def check_model(name: str, *, blur_pool: bool = False, small_stem: bool = False) -> None:
    """Raise `UserError`, naming the field, for what `make_model` would refuse."""
    if name not in MODELS:
        raise UserError(f"model: no network is called {name!r}; known are {', '.join(MODELS)}")
    for field, wanted in (("blur_pool", blur_pool), ("small_stem", small_stem)):
        if wanted and name not in RESNETS:
            raise UserError(f"{field}: {name} has no such option; only {', '.join(RESNETS)} do")


def make_model(
    name: str,
    num_classes: int,
    *,
    zero_init_last_gamma: bool = True,
    blur_pool: bool = False,
    small_stem: bool = False,
) -> nn.Module:
    """A freshly initialised network: images (B, 3, H, W), normalised, -> logits (B, num_classes).

    `zero_init_last_gamma`: the last BN weight of every residual block starts at 0, so that each
    block starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677).
    `blur_pool`: low-pass filters where the image shrinks, see `networks.add_blur`.
    `small_stem`: a 3x3 convolution of stride 1 without max-pool comes first, for images of at
    most 64 px.
    Raises `UserError` as `check_model` does.
    """
    check_model(name, blur_pool=blur_pool, small_stem=small_stem)
    from fastimagenet import networks

    if name == "resnet56":
        return networks.ResNet56(num_classes, zero_init_last_gamma)
    if name == "smallnet":
        return networks.SmallNet(num_classes, zero_init_last_gamma)
    model = networks.torchvision_resnet(name, num_classes, zero_init_last_gamma)
    if small_stem:
        networks.use_small_stem(model)
    if blur_pool:
        networks.add_blur(model)
    return model


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups: first what decays, then BN parameters and biases, which do not.

    The latter are all parameters of at most one dimension. An empty group is left out.
    """
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
