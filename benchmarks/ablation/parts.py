"""The parts of a recipe that are switched off, and how."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks.common.matrix import Variant, variant
from fastimagenet.config import changed_recipe, chosen_recipe
from fastimagenet.recipes.recipe import Recipe
from pipelines.errors import UserError
from pipelines.files import Row

FULL = "all"
"""The name of the runs in which nothing is switched off."""
PEER_LR_PER_IMAGE = 11.5 / (1024 * (1 + 1 / 0.15))
PEER_DECAY_PER_IMAGE = 0.0153 / (1024 * (1 + 1 / 0.15))
"""Of airbench94, which trains cifar10-speed's network by SGD: LR, and LR times weight decay."""
SGD_RATES = "optimizer: by SGD at the LR and decay that cifar10-airbench94 has for it"


def without_muon(recipe: Recipe) -> list[str]:
    """Train by SGD at the rates that airbench94 has for it, whatever the recipe: they suit its
    network, and nothing was tuned for another."""
    lr = PEER_LR_PER_IMAGE * recipe.phases[0].batch_size
    decay = PEER_DECAY_PER_IMAGE / PEER_LR_PER_IMAGE
    return ["optimizer=sgd", f"max_lr={lr:.4g}", f"weight_decay={decay:.4g}"]


def without_growing(recipe: Recipe) -> list[str]:
    """Train every phase at the size of the last one."""
    last = recipe.phases[-1].image_size
    return [f"phases.{index}.image_size={last}" for index in range(len(recipe.phases))]


PARTS: dict[str, Callable[[Recipe], list[str]]] = {
    "whitening": lambda _: ["whitening=false"],
    "dirac_init": lambda _: ["dirac_init=false"],
    "bias_lr_factor": lambda _: ["bias_lr_factor=1"],
    "label_smoothing": lambda _: ["label_smoothing=0"],
    "alternating_flip": lambda _: ["alternating_flip=false"],
    "ema_decay": lambda _: ["ema_decay=0"],
    "optimizer": without_muon,
    "image_size": without_growing,
    "resnet_d": lambda _: ["resnet_d=false"],
    "silu": lambda _: ["silu=false"],
    "blur_pool": lambda _: ["blur_pool=false"],
    "precision": lambda _: ["precision=fp32"],
}
"""Recipe field -> the settings that switch it off. TTA is in every row, on and off."""
LOADER = "loader"
"""With --lengths a part, too: `--backend torchvision` in its place."""


def variants(args: argparse.Namespace, num_train: int) -> list[Variant]:
    """Return the recipe and the recipe without each part that it has.

    Raises UserError for a part that was asked for and that the recipe does not have.
    """
    found = [variant(args, FULL, args.recipe, num_train)]
    whole, _ = changed_recipe(chosen_recipe(args.recipe)[0], args.set)
    for part in args.only or [*PARTS, LOADER]:
        if part == LOADER and args.lengths and args.backend != "torchvision":
            other = argparse.Namespace(**vars(args) | {"backend": "torchvision"})
            found.append(variant(other, part, args.recipe, num_train))
        elif part != LOADER and has(whole, part):
            found.append(variant(args, part, args.recipe, num_train, PARTS[part](whole)))
        elif args.only:
            why = f"recipe {args.recipe} does not use it"
            if part == LOADER:
                why = "it takes --lengths, and a --backend that is not torchvision"
            raise UserError(f"--only {part}: {why}")
    return found


def remarks(result: Row) -> str:
    """Tell below a table what its rows do not show; "" for nothing."""
    optimizer = any(row["run"] == "optimizer" for row in result["rows"])
    found = [f"{SGD_RATES}, whatever the recipe." if optimizer else "", result.get("failed", "")]
    return "\n".join(filter(None, found))


def has(recipe: Recipe, part: str) -> bool:
    """Return whether the recipe uses it, that is, whether there is something to switch off."""
    if part == "image_size":
        return len({phase.image_size for phase in recipe.phases}) > 1
    if part == "optimizer":
        return recipe.optimizer != "sgd"
    return getattr(recipe, part) != getattr(Recipe, part)
