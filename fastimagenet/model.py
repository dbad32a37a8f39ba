"""The networks by name.

Importing this module does not import torch, so that a recipe can be checked without it; the
networks themselves are in `fastimagenet.networks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from torch import nn

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""torchvision's; they alone have `blur_pool` and `small_stem`."""

MODELS = (*RESNETS, "resnet56", "smallnet", "speednet")
OPTIONS = {
    "blur_pool": RESNETS,
    "small_stem": RESNETS,
    "whitening": ("speednet",),
    "dirac_init": ("smallnet", "speednet"),
}
"""The recipe's fields that only some networks have."""


def check_model(name: str, **options: bool) -> None:
    """Raise `UserError`, naming the field, for what `make_model` would refuse."""
    if name not in MODELS:
        raise UserError(f"model: no network is called {name!r}; known are {', '.join(MODELS)}")
    for field, wanted in options.items():
        if wanted and name not in OPTIONS[field]:
            able = ", ".join(OPTIONS[field])
            raise UserError(f"{field}: {name} has no such option; only {able} do")


def make_model(
    name: str,
    num_classes: int,
    *,
    zero_init_last_gamma: bool = True,
    blur_pool: bool = False,
    small_stem: bool = False,
    whitening: bool = False,
    dirac_init: bool = False,
) -> nn.Module:
    """A freshly initialised network: images (B, 3, H, W), normalised, -> logits (B, num_classes).

    `zero_init_last_gamma`: the last BN weight of every residual block starts at 0, so that each
    block starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677).
    `blur_pool`: low-pass filters where the image shrinks, see `networks.add_blur`.
    `small_stem`: a 3x3 convolution of stride 1 without max-pool comes first, for images of at
    most 64 px.
    `whitening`: see `speednet.WhiteningConv2d`. `dirac_init`: see `speednet.use_dirac`.
    Raises `UserError` as `check_model` does.
    """
    check_model(
        name,
        blur_pool=blur_pool,
        small_stem=small_stem,
        whitening=whitening,
        dirac_init=dirac_init,
    )
    from fastimagenet import networks, speednet

    model: nn.Module
    if name == "resnet56":
        model = networks.ResNet56(num_classes, zero_init_last_gamma)
    elif name == "smallnet":
        model = networks.SmallNet(num_classes, zero_init_last_gamma)
    elif name == "speednet":
        model = speednet.SpeedNet(num_classes, whitening)
    else:
        resnet = model = networks.torchvision_resnet(name, num_classes, zero_init_last_gamma)
        if small_stem:
            networks.use_small_stem(resnet)
        if blur_pool:
            networks.add_blur(resnet)
    if dirac_init:
        speednet.use_dirac(model)
    return model
