"""Recipes for a folder of one's own photographs: a few hundred to some ten thousand."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, log2

from fastimagenet.recipes.recipe import Phase, Recipe

_SIZES = ((128, 160), (176, 224))
"""Of training and evaluation, which is a quarter larger: about where a network trained on random
crops sees objects as large as in training (Touvron et al. 2019, arXiv:1906.06423)."""


def photos(nodes: int = 1) -> Recipe:
    """A folder of photographs, from pretrained weights: the default for data of your own.

    python -m fastimagenet.train --data PHOTOS. ResNet-18 of torchvision's ImageNet weights: the
    head alone for an epoch, then all layers, the stem at a tenth of the head's LR; growing
    sizes, 1cycle, TrivialAugment; images are turned upright; batch, sizes and epochs fit the
    folder: see `fitted`.

    Of smallnet, pretrained on five classes of CIFAR-10, on 100 images each of the other five, 300
    updates at 32 px: 82.30 % to 82.56 % top-1, n = 3, two cores of an AMD EPYC (2026-11-29, with
    layer_lrs of 0.01, 0.1 and 1). Of ResNet-18 after three epochs of CIFAR-10, on 100 photographs
    of each of ten breeds of dogs: 38.10 % to 40.90 %; on 50 each of animals and of things:
    69.00 % to 72.00 %, n = 3 each, one core. From ImageNet's weights not yet measured.
    """
    return Recipe(
        name="photos",
        model="resnet18",
        pretrained="imagenet",
        frozen_epochs=1,
        layer_lrs=(0.1, 0.3, 1.0),
        phases=_phases(6, 4),
        max_lr=0.1,
        lr_reference_batch=32,
        use_clr_beta=(10.0, 20.0, 0.95, 0.85),
        weight_decay=1e-3,
        label_smoothing=0.1,
        upright=True,
        auto_augment="trivial",
        tta="flip",
    )


def photos_scratch(nodes: int = 1) -> Recipe:
    """A folder of photographs, from random weights: where no pretrained ones can be had.

    python -m fastimagenet.train --data PHOTOS --recipe photos-scratch. Far behind `photos` on a few
    hundred images: 66.34 % to 68.40 % on the part of CIFAR-10 named there.
    """
    return replace(
        photos(nodes),
        name="photos-scratch",
        pretrained="",
        frozen_epochs=0,
        layer_lrs=(),
        phases=_phases(18, 12),
        max_lr=0.2,
        weight_decay=2e-3,
    )


def _phases(*epochs: int) -> tuple[Phase, ...]:
    return tuple(
        Phase(
            epochs=count,
            image_size=size,
            batch_size=32,
            min_scale=0.35,
            eval_size=eval_size,
        )
        for count, (size, eval_size) in zip(epochs, _SIZES, strict=True)
    )


FITTED = {"photos": photos, "photos-scratch": photos_scratch}
UPDATES_AN_EPOCH = 12
"""At least so many, by smaller batches, where there are images enough for two in a batch."""
IMAGES = {"photos": 10_000, "photos-scratch": 40_000}
"""About so many are looked at in all, whatever the folder holds, within LONGEST epochs."""
LONGEST = 60


def fitted(recipe: Recipe, num_train: int, short_side: int, processes: int = 1) -> Recipe:
    """Fit one of FITTED to a folder of so many training images.

    Batch: a power of two up to that of the recipe, with UPDATES_AN_EPOCH. Epochs: more for small
    folders, never fewer than the recipe's. Sizes: none above `short_side`, in pixels, which most
    images have at least: a phase whose images would only be enlarged is taken smaller.
    """
    batch = num_train // (UPDATES_AN_EPOCH * processes)
    batch = 2 ** int(log2(max(2, min(batch, recipe.phases[0].batch_size))))
    epochs = max(recipe.epochs, min(LONGEST, ceil(IMAGES[recipe.name] / num_train)))
    largest = max(32, short_side // 16 * 16)
    factor = min(1.0, largest / recipe.phases[-1].image_size)
    phases = [
        replace(
            phase,
            batch_size=batch,
            image_size=max(32, round(phase.image_size * factor / 16) * 16),
            eval_size=max(32, min(round(phase.eval_size * factor / 16) * 16, largest)),
        )
        for phase in recipe.phases
    ]
    return replace(recipe, phases=tuple(phases)).stretched(epochs)
