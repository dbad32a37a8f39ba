"""Open the loaders of a recipe for one process."""

from __future__ import annotations

from collections.abc import Mapping

from fastimagenet.distributed.world import World
from fastimagenet.recipes.recipe import Recipe
from pipelines.backends import make_loader
from pipelines.datasets.split import Split
from pipelines.loader import Loader, LoaderSpec, Stage
from pipelines.workers import num_cores


def open_loader(
    backend: str,
    recipe: Recipe,
    split: Split,
    stages: tuple[Stage, ...],
    world: World,
    *,
    training: bool,
    half: bool,
    seed: int = 0,
    copies: Mapping[str, Split] | None = None,
    accumulation: int = 1,
) -> Loader:
    """Open a loader of this process's shard of `split`, as the recipe says; `half`: on a GPU only.

    Raises UserError for a back end that is not installed.
    """
    on_gpu = world.device != "cpu"
    spec = LoaderSpec(
        split=split,
        copies=copies or {},
        stages=stages,
        training=training,
        shard_id=world.rank,
        num_shards=world.world_size,
        accumulation=accumulation,
        seed=seed,
        device=world.device,
        half=half and on_gpu,
        num_threads=max(1, num_cores() // world.local_world_size),
        **recipe.transforms(),
    )
    return make_loader(backend, spec)
