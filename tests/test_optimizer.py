"""Which optimizer a run gets, and what is said where apex cannot be had."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from fastimagenet.recipes import named_recipe
from fastimagenet.training.optimizer import make_optimizer
from pipelines.errors import UserError

RECIPE = named_recipe("digits")


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_torchs_fused_sgd_spares_bn_and_bias_unless_told() -> None:
    optimizer = make_optimizer(model(), RECIPE, "torch")
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [RECIPE.weight_decay, 0.0]
    (group,) = make_optimizer(
        model(), replace(RECIPE, decay_bn_and_bias=True), "torch"
    ).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (4, RECIPE.weight_decay)


def test_a_skipped_first_step_leaves_no_trace() -> None:
    """As the fp16 scaler skips it: the fused kernel is told that a gradient is infinite."""
    weight = nn.Parameter(torch.ones(1000))
    holder = nn.Module()
    holder.weight = weight
    optimizer = make_optimizer(holder, replace(RECIPE, weight_decay=0.0), "torch")
    weight.grad = torch.full_like(weight, torch.inf)
    optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    weight.grad = torch.ones_like(weight)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((1000,), 1 - 0.1 * (1 + 0.9 * 0)))


HAS_APEX = find_spec("apex") is not None


@pytest.mark.skipif(HAS_APEX, reason="apex is installed here")
def test_without_apex_the_error_says_where_it_is() -> None:
    with pytest.raises(UserError, match=r"apex is not installed; build .*github\.com/NVIDIA/apex"):
        make_optimizer(model(), RECIPE, "apex")


@pytest.mark.skipif(HAS_APEX, reason="apex is installed here")
def test_the_other_apex_of_pypi_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "apex-0.9.10.dev0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: Pyramid toolkit\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"apex 0\.9\.10\.dev0 \(Pyramid toolkit\) is another one"):
        make_optimizer(model(), RECIPE, "apex")


def test_apexs_optimizer_is_taken_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with apex's signature: the real one cannot be built without CUDA."""
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "optimizers.py").write_text(
        "import torch\n"
        "class FusedSGD(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0,\n"
        "                 nesterov=False, wd_after_momentum=False):\n"
        "        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)\n"
        "class Broken:\n"
        "    def __init__(self, *_, **__):\n"
        "        raise RuntimeError('apex.optimizers.FusedSGD requires cuda extensions')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        optimizer = make_optimizer(model(), RECIPE, "apex")
        assert type(optimizer).__module__ == "apex.optimizers"
        assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
        optimizers = sys.modules["apex.optimizers"]
        monkeypatch.setattr(optimizers, "FusedSGD", optimizers.Broken)
        with pytest.raises(UserError, match="requires cuda extensions; build NVIDIA apex"):
            make_optimizer(model(), RECIPE, "apex")
    finally:
        for name in ("apex", "apex.optimizers"):
            sys.modules.pop(name, None)
