"""Recipes for Imagewoof: ten breeds of dogs of ImageNet, 9,025 training photographs."""

from __future__ import annotations

from fastimagenet.recipes.recipe import Phase, Recipe


def imagewoof_5(nodes: int = 1) -> Recipe:
    """Imagewoof in 5 epochs at up to 128 px, from random weights.

    python -m fastimagenet.train --data IMAGEWOOF --recipe imagewoof-5. Not yet measured.
    """
    return Recipe(
        name="imagewoof-5",
        model="resnet18",
        resnet_d=True,
        silu=True,
        blur_pool=True,
        phases=(
            Phase(epochs=2, image_size=80, batch_size=96, min_scale=0.35, eval_size=96),
            Phase(epochs=2, image_size=96, batch_size=96, min_scale=0.35, eval_size=128),
            Phase(epochs=1, image_size=128, batch_size=96, min_scale=0.35),
        ),
        max_lr=0.1,
        schedule="piecewise",
        lr_spans=((0, 0.5, 0.2, 1.0), (0.5, 5, 1.0, 0.0)),
        optimizer="muon",
        muon=(0.8, 0.9),
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.1,
        tta="flip",
        target="top1=0.7661",
    )
