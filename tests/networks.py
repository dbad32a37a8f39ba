"""Networks by name and options, for tests that have no recipe."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastimagenet.models import build_model
from fastimagenet.recipes.recipe import Phase, Recipe

PHASES = (Phase(epochs=1, image_size=32, batch_size=2),)


def make_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """The network of a recipe with these fields."""
    return build_model(Recipe(name="test", phases=PHASES, model=name, **options), num_classes)
