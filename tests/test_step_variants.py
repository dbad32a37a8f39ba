"""The training step's variants compute the same, and its floor is counted right."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_step
from benchmarks.common.floor import (
    WEIGHT_BYTES,
    Layer,
    count_layers,
    count_model,
    floor_images_per_sec,
)
from benchmarks.training_step import StepRate, best, main, sweep, synthetic_trainer, variant_recipe
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.training import updates
from pipelines.errors import UserError
from pipelines.files import read_object
from tests.networks import make_model

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on a CPU needs g++"
)
IMAGENET = named_recipe("imagenet", 1)
CLASSES = 10
STEPS, RESNET50_STEPS = 50, 15
native_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this CPU emulates bf16: the small eager network shows it here",
)
LR, MOMENTUM = 0.02, 0.9
SMALL_LR = 0.3
"""Of the small network, which learns less a step."""
HALF_ULP = torch.finfo(torch.bfloat16).eps / 2


def batches(
    image_size: int, batch_size: int, steps: int = STEPS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise with a pattern for each class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randn(CLASSES, 3, image_size, image_size, generator=generator)
    for _ in range(steps):
        labels = torch.randint(CLASSES, (batch_size,), generator=generator)
        noise = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
        images = (noise + patterns[labels]).contiguous(memory_format=torch.channels_last)
        yield images, labels


def lr_of(recipe: Recipe) -> float:
    return SMALL_LR if recipe.model == "smallnet" else LR


def trained_losses(recipe: Recipe, device: str = "cpu", steps: int = STEPS) -> Tensor:
    """Of the Trainer's own updates."""
    trainer = synthetic_trainer(recipe, device, CLASSES)
    phase = trainer.plan.phases[0]
    trainer.model.train()
    losses = []
    for images, labels in batches(phase.image_size, phase.batch_size, steps):
        batch = images.to(device), labels.to(device)
        losses.append(trainer.update((batch,), lr_of(recipe), MOMENTUM, phase))
    return torch.stack(losses).cpu()


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
def plain_losses(
    recipe: Recipe, device: str = "cpu", steps: int = STEPS, seed: int | None = None
) -> Tensor:
    """Of a plain eager loop in fp32, from the same weights on.

    With a `seed`, everything that bf16 would round, forward and backward, is off by a random part
    of half a unit in bf16's last place: weights, and what each layer gives and gets back.
    """
    generator = torch.Generator(device).manual_seed(seed or 0)

    def off(values: Tensor) -> Tensor:
        noise = torch.empty_like(values).uniform_(-HALF_ULP, HALF_ULP, generator=generator)
        return values + values * noise

    def round_layer(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        rounded = off(output)
        rounded.register_hook(off)
        return rounded

    plain = replace(recipe, precision="fp32", compile=False, cuda_graphs=False)
    model = synthetic_trainer(plain, device, CLASSES).model.train()
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=lr_of(recipe), momentum=MOMENTUM)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    if seed is not None:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.Linear):
                layer.register_forward_hook(round_layer)
    phase, losses = recipe.phases[0], []
    for images, labels in batches(phase.image_size, phase.batch_size, steps):
        exact = [parameter.detach().clone() for parameter in model.parameters()]
        if seed is not None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(off(parameter) if parameter.ndim > 1 else parameter)
        loss = criterion(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), exact, strict=True):
                parameter.copy_(value)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@cache
def bounds(
    model: str, image_size: int, batch_size: int, device: str, steps: int
) -> tuple[Tensor, float]:
    """The losses of plain fp32, and how far from them random rounding leads: two seeds' mean."""
    recipe = variant_recipe(with_model(model), "eager", image_size, batch_size)
    plain = plain_losses(recipe, device, steps)
    rounded = [plain_losses(recipe, device, steps, seed) for seed in range(2)]
    return plain, sum(distance(losses, plain) for losses in rounded) / len(rounded)


def distance(losses: Tensor, reference: Tensor) -> float:
    return (losses - reference).square().mean().sqrt().item()


def check_losses(recipe: Recipe, device: str = "cpu", steps: int = STEPS) -> None:
    """As near to plain fp32 as the rounding lets them be.

    The bound is half as much again as what random rounding does; a defect of the size of the
    rounding itself would reach it.
    """
    phase = recipe.phases[0]
    plain, expected = bounds(recipe.model, phase.image_size, phase.batch_size, device, steps)
    assert steps < STEPS or plain[-10:].mean() < plain[0] / 2, "nothing was learned"
    assert distance(trained_losses(recipe, device, steps), plain) < 1.5 * expected


def with_model(model: str) -> Recipe:
    """The recipe `imagenet` with another network."""
    blur_pool = IMAGENET.blur_pool and model.startswith("resnet")
    return replace(IMAGENET, model=model, blur_pool=blur_pool)


def small_recipe(variant: str) -> Recipe:
    return variant_recipe(with_model("smallnet"), variant, 8, 8)


def test_the_step_in_fp32_is_a_plain_loops() -> None:
    recipe = replace(small_recipe("eager"), precision="fp32")
    assert torch.allclose(
        trained_losses(recipe, steps=10), plain_losses(recipe, steps=10), rtol=1e-4
    )


def test_losses_of_the_eager_step_are_those_of_fp32_within_rounding() -> None:
    check_losses(small_recipe("eager"))


@needs_compiler
def test_the_compiled_step_in_fp32_is_a_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of a kind: each takes the compiler seconds."""

    def network(_: Recipe, num_classes: int) -> nn.Module:
        layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
        )

    monkeypatch.setattr(training_step, "build_model", network)
    # Half a minute for a header that a few kernels do not repay.
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
    recipe = replace(small_recipe("compiled"), precision="fp32")
    # Sums in another order, whose rounding the updates after these blow up.
    compiled, plain = trained_losses(recipe, steps=5), plain_losses(recipe, steps=5)
    assert torch.allclose(compiled, plain, rtol=1e-4)


@needs_compiler
@native_bf16
def test_losses_of_the_compiled_step_are_those_of_fp32_within_rounding() -> None:
    check_losses(small_recipe("compiled"))


@native_bf16
def test_losses_of_a_resnet50_are_those_of_fp32_within_rounding() -> None:
    check_losses(variant_recipe(IMAGENET, "eager", 32, 16), steps=RESNET50_STEPS)


def test_cuda_graphs_need_a_gpu_and_the_compiler() -> None:
    with pytest.raises(UserError, match=r"cuda_graphs = true needs a GPU: --set cuda_graphs=false"):
        synthetic_trainer(small_recipe("graphs"), "cpu", CLASSES)
    with pytest.raises(UserError, match="cuda_graphs must be false where compile is false"):
        replace(small_recipe("eager"), cuda_graphs=True)


def test_gradients_of_several_batches_add_up_outside_the_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same sums as without graphs; only the compilation itself is left out here."""
    monkeypatch.setattr(updates, "compiled", lambda module, recipe, device: module)
    found = []
    for variant in ("eager", "graphs"):
        trainer = synthetic_trainer(small_recipe(variant), "cpu", CLASSES)
        trainer.model.train()
        update = tuple(batches(8, 8, 3))
        loss = trainer.update(update, LR, MOMENTUM, trainer.plan.phases[0])
        found.append([loss, *(weight.detach() for weight in trainer.model.parameters())])
    assert all(map(torch.equal, *found))


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast is not judged."""
    monkeypatch.setattr("benchmarks.common.rates.MATRIX", {"cpu": 64})
    monkeypatch.setattr("benchmarks.common.rates.COPY_BYTES", {"cpu": 1 << 16})


class Small(nn.Module):
    """One residual connection; its counts are worked out in the test."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        z = self.bn1(self.conv1(images)).relu()
        z = (self.bn2(self.conv2(z)) + z).relu_()
        return self.fc(z.mean((2, 3)))


def test_bytes_and_operations_of_a_small_network_by_hand() -> None:
    with torch.device("meta"):
        layers = count_model(Small(), torch.empty(2, 3, 8, 8))
    x, y = 3 * 8 * 8, 4 * 8 * 8
    norm = 3 * y + 2 * y + 3 * y  # statistics, then y -> z; sums of dz and y; dz and y -> dy
    assert layers == [
        # No gradient of the image; that of z, which two layers read, is read once more.
        Layer(image_size=8, flops=2 * 2 * y * 27, values=2 * (x + y) + norm + y, weights=4 * 27),
        # The added z is read as well, and takes its gradient as it is.
        Layer(image_size=8, flops=3 * 2 * y * 4, values=3 * (y + y) + norm + y, weights=4 * 4),
        Layer(image_size=1, flops=0, values=2 * (y + 4), weights=0),
        Layer(image_size=1, flops=3 * 2 * 4 * 5, values=3 * (4 + 5), weights=5 * 4 + 5),
    ]
    assert layers[1].bytes(batch_size=8, width=2) == 2 * layers[1].values + 34 * 16 / 8
    assert WEIGHT_BYTES == {2: 34, 4: 32}
    # Memory is the limit of one, computing of the other: 1 + 3 seconds.
    slow = [Layer(image_size=1, flops=1, values=5), Layer(image_size=1, flops=30, values=1)]
    assert floor_images_per_sec(slow, 8, 2, flops_per_sec=10, bytes_per_sec=10) == 1 / 4


@pytest.mark.parametrize("blur_pool", [False, True])
def test_operations_of_a_resnet50_are_those_that_torch_counts(blur_pool: bool) -> None:
    layers = count_layers(replace(IMAGENET, blur_pool=blur_pool), 224)
    with torch.device("meta"):
        model, images = (
            make_model("resnet50", 1000, blur_pool=blur_pool),
            torch.empty(2, 3, 224, 224),
        )
    with FlopCounterMode(display=False) as counted:
        logits = model(images)
        forward = counted.get_total_flops()
        logits.sum().backward()
    assert 2 * sum(layer.flops for layer in layers) == counted.get_total_flops()
    if not blur_pool:
        assert forward / 2 / 2 == pytest.approx(4.09e9, rel=1e-3)
        assert sum(layer.weights for layer in layers) == sum(
            parameter.numel() for name, parameter in model.named_parameters()
            if parameter.ndim > 1 or name == "fc.bias"
        )  # fmt: skip


def fake_measure(recipe: Recipe, device: str, seconds: float) -> tuple[list[float], int]:
    if recipe.phases[0].batch_size > 16:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 7 GiB")
    if recipe.compile:
        raise ValueError
    return [10.0 * recipe.phases[0].batch_size] * 5, 123


def test_memory_ends_a_sweep_and_an_error_only_its_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "measure", fake_measure)
    reported: list[StepRate] = []
    recipe = with_model("smallnet")
    rates = sweep(
        (32, 64), ("compiled", "eager"), (64, 8, 16, 32),
        device="cpu", seconds=0.01, report=reported.append, recipe=recipe,
    )  # fmt: skip
    assert rates == reported
    expected = [("compiled", 8), ("eager", 8), ("eager", 16), ("eager", 32)]
    assert [(rate.image_size, rate.variant, rate.batch_size) for rate in rates] == [
        (size, *one) for size in (32, 64) for one in expected
    ]
    errors = ["ValueError", "", "", "CUDA out of memory. Tried to allocate 7 GiB"]
    assert [rate.error for rate in rates] == 2 * errors
    assert all((rate.floor_images_per_sec is None) == bool(rate.error) for rate in rates)
    assert [(rate.image_size, rate.batch_size) for rate in best(rates)] == [(32, 16), (64, 16)]
    assert "64 px  compiled  batch    8  ValueError" in str(rates[4])


def test_the_command_measures_writes_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "step.json"
    flags = ["--model", "smallnet", "--sizes", "32", "--batches", "2", "--seconds", "0.1"]
    flags += ["--variants", "graphs", "eager", "--device", "cpu", "--json", str(file)]
    assert main(flags) == 1
    graphs, eager = read_object(file)["rates"]
    assert "needs a GPU" in graphs["error"] and graphs["floor_images_per_sec"] is None
    assert eager["images_per_sec"]["mean"] > 0 and eager["peak_memory_bytes"] > 2**20
    layers = count_layers(with_model("smallnet"), 32)
    assert eager["flops_per_image"] == sum(layer.flops for layer in layers)
    out, err = capsys.readouterr()
    assert "| 32 px eager" in out and "error: 32 px  graphs" in err


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(UserError, match="--seconds"):
        main(["--seconds", "0", "--device", "cpu"])
    with pytest.raises(UserError, match="--variants"):
        main(["--variants", "eagre"])
