"""The ordinary training step in its variants, as fields of the recipe, on synthetic data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.phase_rates import one_phase
from fastimagenet.distributed import World
from fastimagenet.model import make_model
from fastimagenet.reading import open_loader
from fastimagenet.recipes import Phase, Recipe
from fastimagenet.recorder import NullRecorder
from fastimagenet.trainer import Trainer
from pipelines.images import whole_files
from pipelines.loader import Loader
from pipelines.split import Split

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
    plan, world = recipe.plan(1, count), World(device=device)

    def loader(training: bool) -> Loader:
        stages = plan.train_stages() if training else plan.eval_stages()
        half = recipe.precision != "fp32"
        return open_loader("synthetic", recipe, split, stages, world, training=training, half=half)

    torch.manual_seed(0)
    model = make_model(
        recipe.model,
        num_classes,
        zero_init_last_gamma=recipe.zero_init_last_gamma,
        blur_pool=recipe.blur_pool,
        small_stem=recipe.small_stem,
    )
    return Trainer(plan, model, world, loader, NullRecorder())
