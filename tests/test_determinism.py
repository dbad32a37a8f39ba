"""`--deterministic`: what it sets, that runs repeat themselves, and what it cannot repeat."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastimagenet.models.smallnet import GlobalMaxPool
from fastimagenet.training import checkpoint, determinism
from fastimagenet.training.trainer import Trainer
from tests.commands import SMALL, error_of, losses_of, summary_of, train

FLAGS = (*SMALL, "--deterministic")


def settings() -> tuple[object, ...]:
    """What a run may change of torch and of the environment."""
    cudnn = torch.backends.cudnn
    workspace = os.environ.get(determinism.WORKSPACE)
    algorithms = torch.are_deterministic_algorithms_enabled()
    return algorithms, cudnn.benchmark, cudnn.deterministic, workspace


def test_two_runs_are_equal_bit_for_bit_and_torch_is_left_as_it_was(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, ...]] = []
    fit = Trainer.fit

    def looking(trainer: Trainer) -> None:
        seen.append(settings())
        fit(trainer)

    monkeypatch.setattr(Trainer, "fit", looking)
    before = settings()
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        train("--data", cifar10, "--output", folder, *FLAGS, "--epochs", 1)
    assert seen == [(True, False, True, ":4096:8")] * 2
    assert settings() == before
    assert losses_of(folders[0]) == losses_of(folders[1])
    one, two = (checkpoint.load(folder / "checkpoints" / "last.pt")["model"] for folder in folders)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    summary = summary_of(folders[0])
    assert (summary["deterministic"], summary["threads"]) == (True, torch.get_num_threads())

    (folders[0] / "summary.json").unlink()
    flags = ("--data", cifar10, "--output", folders[0], *SMALL, "--epochs", 1)
    out, _ = train(*flags, "--resume", "auto")
    assert ", without --deterministic: equal to a run without a stop up to rounding only" in out
    assert summary_of(folders[0])["deterministic"] is False


class Unrepeatable(nn.Module):
    """A network with an operation that has one algorithm only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        means.detach().put_(torch.tensor([0]), torch.tensor([0.0]))
        return self.fc(means)


def test_what_torch_cannot_repeat_is_one_line(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastimagenet.models.build_model", lambda *_: Unrepeatable())
    before = settings()
    message = error_of("--data", cifar10, "--output", tmp_path / "run", *FLAGS)
    assert message == (
        "error: --deterministic: torch has no deterministic put_, which recipe field model = "
        "'smallnet' needs on this device: --set model= another network, or leave --deterministic "
        "out"
    )
    assert settings() == before


def test_a_workspace_with_which_cublas_does_not_repeat_itself_is_refused(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(determinism.WORKSPACE, ":0:0")
    message = error_of("--data", cifar10, "--output", tmp_path / "run", *FLAGS)
    assert "CUBLAS_WORKSPACE_CONFIG must be :4096:8 or :16:8 for --deterministic, not" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_pool_give_the_same_bits(form: Any, dtype: torch.dtype) -> None:
    """With ties, too: values are few."""
    torch.manual_seed(0)
    values = torch.randn(16, 32, 4, 3).round().to(dtype).to(memory_format=form)
    given = torch.randn(16, 32, 1, 1).to(dtype)
    found = []
    for on in (False, True):
        torch.use_deterministic_algorithms(on)
        try:
            images = values.clone().requires_grad_()
            pooled = GlobalMaxPool(1)(images)
            pooled.backward(given)
        finally:
            torch.use_deterministic_algorithms(False)
        assert images.grad is not None
        found.append((pooled.detach(), images.grad))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
