"""The named recipes: node count -> recipe, one table of functions.

Each docstring is the recipe's citation: command, hardware, time, accuracy and n as measured.
"""

from __future__ import annotations

from collections.abc import Callable

from fastimagenet.recipes import superconvergence
from fastimagenet.recipes.cifar10 import cifar10, cifar10_speed
from fastimagenet.recipes.digits import digits
from fastimagenet.recipes.imagenet import (
    imagenet,
    imagenet_2018_1,
    imagenet_2018_4,
    imagenet_2018_8,
    imagenet_2018_16,
    imagenet_one_gpu,
)
from fastimagenet.recipes.imagewoof import imagewoof_5, imagewoof_20
from fastimagenet.recipes.photos import photos, photos_scratch
from fastimagenet.recipes.recipe import Recipe
from pipelines.errors import UserError, did_you_mean

RECIPES: dict[str, Callable[[int], Recipe]] = {
    "digits": digits,
    "photos": photos,
    "photos-scratch": photos_scratch,
    "cifar10": cifar10,
    "cifar10-speed": cifar10_speed,
    **superconvergence.RECIPES,
    "imagewoof-5": imagewoof_5,
    "imagewoof-20": imagewoof_20,
    "imagenet": imagenet,
    "imagenet-one-gpu": imagenet_one_gpu,
    "imagenet-2018-1": imagenet_2018_1,
    "imagenet-2018-4": imagenet_2018_4,
    "imagenet-2018-8": imagenet_2018_8,
    "imagenet-2018-16": imagenet_2018_16,
}


def named_recipe(name: str, nodes: int = 1) -> Recipe:
    """Make the recipe of that name in its variant for `nodes` nodes. Raises UserError."""
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise UserError(f"--recipe {name} is neither a recipe nor a .toml file: {hint}")
    return RECIPES[name](nodes)
