"""The networks by name."""

from __future__ import annotations

from torch import nn

from fastimagenet.models import resnet, smallnet, speednet, timms
from fastimagenet.recipes.recipe import TIMM, Recipe


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Build the recipe's network, initialised with torch's global random generator.

    Images (B, 3, H, W), normalised, -> logits (B, num_classes). Raises UserError for a network of
    timm's that is not there.
    """
    model: nn.Module
    if recipe.model.startswith(TIMM):
        sizes = {size for p in recipe.phases for size in (p.image_size, p.eval_size) if size}
        model = timms.make_model(recipe.model, num_classes, sorted(sizes))
    elif recipe.model == "resnet56":
        model = resnet.ResNet56(num_classes, recipe.zero_init_last_gamma)
    elif recipe.model == "smallnet":
        model = smallnet.SmallNet(num_classes, recipe.zero_init_last_gamma)
    elif recipe.model == "speednet":
        model = speednet.SpeedNet(num_classes, recipe.whitening)
    else:
        model = resnet.torchvision_resnet(recipe.model, num_classes, recipe.zero_init_last_gamma)
        if recipe.small_stem:
            resnet.use_small_stem(model)
        if recipe.resnet_d:
            resnet.use_resnet_d(model)
        if recipe.silu:
            resnet.use_silu(model)
        if recipe.blur_pool:
            resnet.add_blur(model)
    if recipe.dirac_init:
        speednet.use_dirac(model)
    return model
