"""Recipes for Imagewoof: ten breeds of dogs of ImageNet, 9,025 training photographs.

The marks are those of its leaderboard (github.com/fastai/imagenette) at 128 px: weights from
scratch, no test-time augmentation, validation no larger than training, the mean of five runs.
"""

from __future__ import annotations

from dataclasses import replace

from fastimagenet.recipes.recipe import Phase, Recipe


def imagewoof_5(nodes: int = 1) -> Recipe:
    """Imagewoof in 5 epochs at up to 128 px, from random weights; the leaderboard has 76.61 %.

    python -m fastimagenet.train --data IMAGEWOOF --recipe imagewoof-5. ResNet-18 as a ResNet-D with
    SiLU and low-pass filters, Muon, growing sizes, label smoothing. One core of an AMD EPYC without
    AVX-512, fp32, photographs with a short side of 160 px, other work beside: 77.97 % top-1
    (77.73 % to 78.11 %), 78.92 % with TTA, 2,397 s to 2,507 s of training, n = 3 (2026-11-29).
    """
    return Recipe(
        name="imagewoof-5",
        model="resnet18",
        resnet_d=True,
        silu=True,
        blur_pool=True,
        phases=(
            Phase(epochs=2, image_size=80, batch_size=64, min_scale=0.35, eval_size=96),
            Phase(epochs=2, image_size=96, batch_size=64, min_scale=0.35, eval_size=128),
            Phase(epochs=1, image_size=128, batch_size=64, min_scale=0.35),
        ),
        max_lr=0.1,
        schedule="piecewise",
        lr_spans=((0, 0.5, 0.2, 1.0), (0.5, 5, 1.0, 0.0)),
        optimizer="muon",
        muon=(0.8, 0.6),
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.1,
        tta="flip",
        target="top1=0.7661",
    )


def imagewoof_20(nodes: int = 1) -> Recipe:
    """Imagewoof in 20 epochs, else as `imagewoof-5`; the leaderboard has 86.27 %.

    python -m fastimagenet.train --data IMAGEWOOF --recipe imagewoof-20. Not yet measured.
    """
    recipe = imagewoof_5(nodes).stretched(20)
    return replace(recipe, name="imagewoof-20", target="top1=0.8627")
