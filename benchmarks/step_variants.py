"""The ordinary training step in its variants, as fields of the recipe, on synthetic data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.phase_rates import one_phase
from fastimagenet.distributed.world import World
from fastimagenet.models import build_model
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.training.loaders import open_loader
from fastimagenet.training.trainer import Trainer
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split
from pipelines.loader import Loader

FIELDS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False, "cuda_graphs": False},
    "compiled": {"compile": True, "cuda_graphs": False},
    "graphs": {"compile": True, "cuda_graphs": True},
}
VARIANTS = tuple(FIELDS)


def variant_recipe(recipe: Recipe, variant: str, image_size: int, batch_size: int) -> Recipe:
    """The recipe as one epoch at this size, in bf16, with the fields of the variant."""
    phase = Phase(epochs=1, image_size=image_size, batch_size=batch_size)
    return replace(one_phase(recipe, phase), precision="bf16", **FIELDS[variant])


def synthetic_trainer(recipe: Recipe, device: str, num_classes: int) -> Trainer:
    """The Trainer of one process with a fresh network, always the same, and batches of noise.

    `device` is "cpu" or "cuda:INDEX". Raises UserError for what the device cannot do.
    """
    count = 2 * max(phase.batch_size for phase in recipe.phases)
    labels = [index % num_classes for index in range(count)]
    split = Split(whole_files([""]) * count, labels, tuple(map(str, range(num_classes))))
    plan, world = Plan.of(recipe, 1, count), World(device=device)

    def loader(training: bool) -> Loader:
        stages = plan.phases if training else plan.eval_stages()
        half = recipe.precision != "fp32"
        return open_loader("synthetic", recipe, split, stages, world, training=training, half=half)

    torch.manual_seed(0)
    model = build_model(recipe, num_classes)
    return Trainer(plan, model, loader(True), loader(False), world=world)
