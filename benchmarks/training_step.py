"""How fast the training step is, by image size, batch size and variant, and how far from the floor.

    python -m benchmarks.training_step --sizes 128 224 --variants eager compiled graphs

The step is the Trainer's own, in bf16 and channels_last with the fused optimizer, on a synthetic
batch that stays on the device. Its variants are recipe fields, so users can have each of them. For
each size and variant the batch grows until memory ends. The floor is what the ceilings measured on
the device allow for the bytes and operations that `benchmarks.step_floor` counts.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.ceilings import calls_per_sec, copy_bytes_per_sec, matmul_flops_per_sec
from benchmarks.intervals import Estimate, estimate
from benchmarks.phase_rates import memory_bytes, one_phase, update
from fastimagenet.distributed import World
from fastimagenet.model import make_model
from fastimagenet.reading import open_loader
from fastimagenet.recipe_book import named_recipe
from fastimagenet.recipes import Phase, Recipe
from fastimagenet.recorder import NullRecorder
from fastimagenet.trainer import Trainer
from fastimagenet.warm_up import warm_up
from pipelines.images import whole_files
from pipelines.loader import Loader
from pipelines.split import Split

FIELDS = {
    "eager": {"compile": False, "cuda_graphs": False},
    "compiled": {"compile": True, "cuda_graphs": False},
    "graphs": {"compile": True, "cuda_graphs": True},
}
"""What the variants are as fields of the recipe."""
VARIANTS = tuple(FIELDS)
ROUNDS = 5
NUM_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class StepRate:
    """One size, variant and batch size, on one device."""

    image_size: int
    variant: str
    batch_size: int
    images_per_sec: Estimate
    """Over ROUNDS turns; 0 where there is an error."""
    peak_memory_bytes: int
    """GPU: the most that torch has allocated, compilation included. CPU: the most that the process
    has had resident up to here."""
    flops_per_image: float
    """Of a step, as the floor counts them; a multiply-add is two."""
    bytes_per_image: float
    floor_images_per_sec: float | None
    """What no step can be faster than, from the ceilings measured here; None with an error."""
    error: str
    """Why there is no rate; "" otherwise."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device does at most, measured."""

    flops_per_sec: Estimate
    """Of a large bf16 matrix product."""
    bytes_per_sec: Estimate
    """Read and written by a large copy."""


def sweep(
    sizes: Sequence[int],
    variants: Sequence[str],
    batches: Sequence[int],
    *,
    device: str,
    seconds: float,
    report: Callable[[StepRate], object],
    recipe: Recipe | None = None,
) -> list[StepRate]:
    """Every size and variant with each of the batch sizes, smallest first, until memory ends.

    `device` is "cpu" or "cuda:INDEX"; each rate takes ROUNDS turns of `seconds` / ROUNDS, and is
    given to `report` (such as `print`) at once. A variant that fails gets one row with its error,
    and the next one follows. `recipe`: `imagenet` unless given.
    """
    raise NotImplementedError
