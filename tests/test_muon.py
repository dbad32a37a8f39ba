"""Muon for filters against its formula, and the groups that share out the plan's LR."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastimagenet.recipes import named_recipe
from fastimagenet.training.optimizer import Muon, make_optimizer, param_groups, set_rates
from pipelines.errors import UserError
from tests.networks import make_model

RECIPE = named_recipe("cifar10-speed")


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten())
    layers.append(nn.Linear(4, 2))
    return layers.to(memory_format=torch.channels_last)


def gradients(layers: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in layers.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Three quintic iterations in float64, with the coefficients of Jordan's page."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.01), ("auto", 1e-5)])
def test_filters_go_by_muon_and_all_else_by_sgd(
    precision: Literal["bf16", "auto"], tolerance: float
) -> None:
    ours, plain = model(), model()
    optimizer = make_optimizer(ours, replace(RECIPE, precision=precision), "torch")
    others = [p for p in plain.parameters() if p.ndim < 4]
    sgd = torch.optim.SGD(param_groups(plain, replace(RECIPE, optimizer="sgd")), nesterov=True,
                          lr=1.0, momentum=0.85)  # fmt: skip
    expected = {i: p.detach().double().numpy() for i, p in enumerate(ours.parameters())}
    momentum = {i: np.zeros_like(value) for i, value in expected.items()}
    for step in range(3):
        lr = 0.4 - 0.1 * step
        gradients(ours, step)
        gradients(plain, step)
        for index, parameter in enumerate(ours.parameters()):
            if parameter.ndim == 4:
                gradient = parameter.grad.double().numpy()  # type: ignore[union-attr]
                momentum[index] = 0.6 * momentum[index] + gradient
                wanted = (gradient + 0.6 * momentum[index]).reshape(len(gradient), -1)
                update = newton_schulz(wanted).reshape(gradient.shape)
                old = expected[index]
                scaled = old * len(old) ** 0.5 / np.linalg.norm(old)
                expected[index] = scaled - 0.205 * lr * update
        set_rates(optimizer, lr, 0.85, epoch=0)
        set_rates(sgd, lr, 0.85, epoch=0)
        optimizer.step()
        sgd.step()
    for index, parameter in enumerate(ours.parameters()):
        if parameter.ndim == 4:
            found = parameter.detach().numpy()
            np.testing.assert_allclose(found, expected[index], atol=tolerance, rtol=tolerance)
    for one, two in zip([p for p in ours.parameters() if p.ndim < 4], others, strict=True):
        torch.testing.assert_close(one, two)


def test_an_update_is_nearly_orthogonal() -> None:
    """Against the SVD: the same singular vectors, and singular values about 1."""
    layers = nn.Conv2d(8, 16, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(layers, RECIPE, "torch")
    layers.weight.grad = torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    u, _, v = torch.linalg.svd(layers.weight.grad.flatten(1), full_matrices=False)
    set_rates(optimizer, 1.0, 0.9, epoch=0)
    before = layers.weight.detach() * 4 / layers.weight.detach().norm()
    optimizer.step()
    update = (before - layers.weight.detach()).flatten(1) / 0.205
    values = u.T @ update @ v.T
    assert (values - values.diag().diag()).abs().max() < 0.05
    assert 0.5 < values.diag().min() and values.diag().max() < 1.3


def test_its_state_goes_through_a_file() -> None:
    """A restored optimizer makes the same updates, bit for bit."""
    one = model()
    first = make_optimizer(one, RECIPE, "torch")
    for step in range(2):
        gradients(one, step)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    two = copy.deepcopy(one)
    second = make_optimizer(two, RECIPE, "torch")
    second.load_state_dict(torch.load(file, weights_only=True))
    for step in range(2, 5):
        for layers, optimizer in ((one, first), (two, second)):
            gradients(layers, step)
            set_rates(optimizer, 0.1, 0.8, epoch=0)
            optimizer.step()
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_an_update_without_gradients_changes_no_direction() -> None:
    layers = model()
    optimizer = make_optimizer(layers, RECIPE, "torch")
    assert isinstance(optimizer, Muon)
    before = layers[0].weight.detach().clone()  # type: ignore[index, operator, union-attr]
    optimizer.step()
    after = layers[0].weight.detach()  # type: ignore[index, operator, union-attr]
    torch.testing.assert_close(after / after.norm(), before / before.norm())


@pytest.mark.parametrize("kind", ["muon", "sgd"])
def test_biases_get_their_lr_and_no_more_decay(kind: str) -> None:
    net = make_model("speednet", 10, whitening=True)
    recipe = replace(RECIPE, optimizer=kind, whitening_bias_epochs=2)
    optimizer = make_optimizer(net.to(memory_format=torch.channels_last), recipe, "torch")

    def rate(parameter: Tensor) -> tuple[float, float]:
        (group,) = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        return group["lr"], group["lr"] * group["weight_decay"]

    for epoch, whitening in ((1, 32.0), (2, 0.0)):
        set_rates(optimizer, 0.5, 0.9, epoch)
        decay = 0.5 * recipe.weight_decay
        assert rate(net.fc.weight) == pytest.approx((0.5, decay))
        assert rate(net.blocks[1].bn2.bias) == pytest.approx((32.0, decay))
        assert rate(net.first.bias)[0] == whitening
        filters = (0.5 * 0.205, 0.0) if kind == "muon" else (0.5, decay)
        assert rate(net.blocks[0].conv1.weight) == pytest.approx(filters)
    learning = {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = {name for name, p in net.named_parameters() if id(p) not in learning}
    scales = {f"blocks.{block}.bn{bn}.weight" for block in range(3) for bn in (1, 2)}
    assert frozen == {"first.weight", *scales}
    momenta = {group["momentum"] for group in optimizer.param_groups}
    assert momenta == ({0.9, 0.6} if kind == "muon" else {0.9})


def test_muon_is_not_apexs() -> None:
    with pytest.raises(UserError, match="--optimizer-backend apex has no muon: take torch"):
        make_optimizer(model(), RECIPE, "apex")
