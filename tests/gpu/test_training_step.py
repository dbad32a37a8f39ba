"""The variants of the training step on the GPU: equal losses, no waiting, new sizes, sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from test_step_variants import (
    CLASSES,
    IMAGENET,
    LR,
    MOMENTUM,
    RESNET50_STEPS,
    batches,
    check_losses,
    with_model,
)

from benchmarks.training_step import VARIANTS, sweep, synthetic_trainer, variant_recipe
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.training.trainer import Trainer

GPU = "cuda:0"


def small_recipe(variant: str) -> Recipe:
    return variant_recipe(with_model("resnet18"), variant, 32, 16)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled is left to the next test."""
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_plain_fp32_within_rounding(variant: str) -> None:
    check_losses(small_recipe(variant), GPU)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_of_a_resnet50_are_those_of_plain_fp32_within_rounding(variant: str) -> None:
    check_losses(variant_recipe(IMAGENET, variant, 64, 16), GPU, RESNET50_STEPS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_never_waits_for_the_gpu(variant: str) -> None:
    trainer = synthetic_trainer(small_recipe(variant), GPU, CLASSES)
    if trainer.plan.recipe.compile:
        trainer.compile_all_sizes()
    trainer.model.train()
    batch = next(iter(trainer.train_loader))
    for _ in range(3):  # cuDNN tries its algorithms, the allocator its blocks
        trainer.train_step((batch,), trainer.plan.phases[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step((batch,), trainer.plan.phases[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def updated(trainer: Trainer, count: int) -> list[torch.Tensor]:
    """The weights after an update of `count` batches."""
    trainer.model.train()
    update = tuple((a.to(GPU).half(), b.to(GPU)) for a, b in batches(32, 16, count))
    for _ in range(3):
        trainer.update(update, LR, MOMENTUM, trainer.plan.phases[0])
    return [weight.detach().clone() for weight in trainer.model.parameters()]


def test_gradients_of_several_batches_add_up_with_cuda_graphs() -> None:
    found = []
    for variant in ("compiled", "graphs"):
        trainer = synthetic_trainer(small_recipe(variant), GPU, CLASSES)
        trainer.compile_all_sizes()
        found.append(updated(trainer, 3))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-3)


def test_graphs_of_two_sizes_take_turns() -> None:
    recipe = small_recipe("graphs")
    phases = tuple(Phase(epochs=1, image_size=size, batch_size=16) for size in (32, 48))
    spans = ((0.0, 2.0, 1.0, 1.0),)
    trainer = synthetic_trainer(replace(recipe, phases=phases, lr_spans=spans), GPU, CLASSES)
    trainer.compile_all_sizes()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    trainer.fit()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert len(trainer.records) == 2


def test_memory_ends_a_sweep_and_leaves_the_gpu_usable() -> None:
    recipe = with_model("resnet18")
    rates = sweep(
        (224,), ("eager", "graphs"), (16, 1 << 17),
        device=GPU, seconds=0.5, report=print, recipe=recipe,
    )  # fmt: skip
    assert [bool(rate.error) for rate in rates] == [False, True, False, True]
    assert all("out of memory" in rate.error for rate in rates[1::2])
    assert all(0 < rate.share_of_floor < 1 for rate in rates[::2])
