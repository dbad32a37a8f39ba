"""Networks of timm, an extra: `model = "timm:NAME"`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastimagenet.recipes.recipe import TIMM
from fastimagenet.recipes.timms import settings_of
from pipelines.errors import UserError


def make_model(
    model: str, num_classes: int, image_sizes: Sequence[int], *, pretrained: bool = False
) -> nn.Module:
    """Make the network `timm:NAME`. Raises UserError naming the recipe's field.

    image_sizes: those that it will get. Its head has `num_classes` outputs, also with timm's
    `pretrained` weights, which timm downloads.
    """
    timm, settings = settings_of(model)
    if settings.get("fixed_input_size"):
        side = settings["input_size"][-1]
        if any(size != side for size in image_sizes):
            raise UserError(
                f"recipe field model = {model!r} takes images of {side} px only: "
                f"--set phases.*.image_size={side} --set phases.*.eval_size={side}"
            )
    made: nn.Module = timm.create_model(
        model.removeprefix(TIMM), pretrained=pretrained, num_classes=num_classes
    )
    return made
