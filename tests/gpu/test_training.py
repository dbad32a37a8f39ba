"""Training steps on the GPU: number formats, compiled phase changes, DDP over NCCL, memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastimagenet import lr_find2
from fastimagenet.distributed.world import World
from fastimagenet.lr_finder.sweep import SweepRecord
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.training.trainer import Trainer
from pipelines.backends import make_loader
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split
from pipelines.errors import UserError
from pipelines.loader import Loader, LoaderSpec
from tests.networks import make_model

ROOT = Path(__file__).resolve().parents[2]
SPLIT = Split(whole_files([""]) * 256, [index % 10 for index in range(256)], tuple("abcdefghij"))
RECIPE = Recipe(
    name="test",
    model="resnet18",
    small_stem=True,
    phases=(
        Phase(epochs=2, image_size=32, batch_size=64),
        Phase(epochs=1, image_size=48, batch_size=32),
    ),
    max_lr=0.05,
)


def make_trainer(recipe: Recipe, model: nn.Module | None = None) -> Trainer:
    plan = Plan.of(recipe, 1, len(SPLIT))
    torch.manual_seed(0)

    def loader(training: bool) -> Loader:
        spec = LoaderSpec(
            split=SPLIT,
            stages=plan.phases if training else plan.eval_stages(),
            training=training,
            device="cuda:0",
            half=recipe.precision in ("bf16", "fp16"),
            **recipe.transforms(),
        )
        return make_loader("synthetic", spec)

    model = model or make_model(recipe.model, 10, small_stem=True)
    return Trainer(plan, model, loader(True), loader(False), world=World(device="cuda:0"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near_fp32(precision: str) -> None:
    plain, mixed = (
        make_trainer(replace(RECIPE, precision="fp32")),
        make_trainer(
            replace(RECIPE, precision=precision)  # type: ignore[arg-type]
        ),
    )
    assert mixed.scaler.is_enabled() == (precision == "fp16")
    if precision == "fp16":  # at which no update is left out
        mixed.scaler.load_state_dict(mixed.scaler.state_dict() | {"scale": 1024.0})
    plain.fit()
    mixed.fit()
    for one, two in zip(plain.records, mixed.records, strict=True):
        assert two.train_loss == pytest.approx(one.train_loss, rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_sweep_in_mixed_precision_stays_near_fp32_and_leaves_no_trace(precision: str) -> None:
    plain = lr_find2(make_trainer(replace(RECIPE, precision="fp32")), end_lr=0.1, num_it=12)
    trainer = make_trainer(
        replace(RECIPE, precision=precision)  # type: ignore[arg-type]
    )

    def state() -> dict[str, Any]:
        optimizer = trainer.optimizer.state_dict()
        tensors = [entry["momentum_buffer"] for entry in optimizer["state"].values()]
        tensors += [*trainer.model.state_dict().values(), torch.cuda.get_rng_state()]
        values = [optimizer["param_groups"], trainer.scaler.state_dict(), trainer.step]
        values += [trainer.train_loader.state_dict(), trainer.eval_loader.state_dict()]
        return copy.deepcopy({"tensors": tensors, "values": values})

    def draw(_: SweepRecord) -> None:
        torch.rand(1, device="cuda")

    before = state()
    mixed = lr_find2(trainer, end_lr=0.1, num_it=12, on_record=draw)
    after = state()
    assert all(map(torch.equal, before["tensors"], after["tensors"]))
    assert before["values"] == after["values"]
    assert mixed.ended == plain.ended == "finished"
    for one, two in zip(plain.records, mixed.records, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=0.05)
    trainer.fit()


@pytest.mark.parametrize("mixup, cuda_graphs", [(0.0, False), (0.2, False), (0.0, True)])
def test_a_compiled_run_changes_phase_without_compiling_again(
    mixup: float, cuda_graphs: bool
) -> None:
    recipe = replace(RECIPE, precision="bf16", mixup=mixup)
    trainer = make_trainer(replace(recipe, compile=True, cuda_graphs=cuda_graphs))
    trainer.compile_all_sizes()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    trainer.fit()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    eager = make_trainer(recipe)
    eager.fit()
    assert trainer.records[0].train_loss == pytest.approx(eager.records[0].train_loss, rel=0.05)


def test_out_of_memory_names_the_batch_size() -> None:
    huge = replace(RECIPE, phases=(Phase(epochs=1, image_size=32, batch_size=256),))

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(10))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.empty(2**50, device=images.device) + self.weight

    with pytest.raises(
        UserError, match=r"batch_size 256 at 32 px: --set phases\.0\.batch_size=128"
    ):
        make_trainer(huge, Greedy()).fit()


def test_ddp_over_nccl_with_one_process(tmp_path: Path) -> None:
    """NCCL itself; the trainer wraps in DDP from two processes on."""
    code = (
        "import torch, torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel\n"
        "from fastimagenet.training.ddp import CommunicationTimer\n"
        "dist.init_process_group('nccl')\n"
        "model = DistributedDataParallel(torch.nn.Linear(8, 8).cuda(), device_ids=[0],\n"
        "    gradient_as_bucket_view=True, static_graph=True)\n"
        "timer = CommunicationTimer(model, bf16_gradients=True)\n"
        "for _ in range(3):\n"
        "    model(torch.ones(4, 8, device='cuda')).sum().backward()\n"
        "    timer.after_backward()\n"
        "torch.cuda.synchronize()\n"
        "assert timer.take_seconds() >= 0\n"
        "assert torch.all(model.module.weight.grad == 12)\n"
        "dist.destroy_process_group()\n"
    )
    script = tmp_path / "ddp.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(torchrun, check=True, env=environment)


def test_the_command_trains_on_the_gpu(cifar10: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fastimagenet.train", "--recipe", "tests/small.toml"]
    flags = ["--device", "cuda", "--nproc-per-node", "1", "--data", str(cifar10)]
    subprocess.run([*command, *flags, "--output", str(folder)], check=True, cwd=ROOT)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["device"], summary["precision"]) == ("cuda", "bf16")
    assert sum(summary["time_split_seconds"].values()) == pytest.approx(summary["wall_seconds"])


def test_two_runs_in_deterministic_mode_are_equal_bit_for_bit(tmp_path: Path) -> None:
    """Of networks with and without torch's pools, in a process of its own: before CUDA starts."""
    script = """
import sys
from fastimagenet.train import main
for folder in sys.argv[2:]:
    flags = ["--recipe", "digits", "--set", f"model={sys.argv[1]}", "--epochs", "2"]
    assert main([*flags, "--nproc-per-node", "1", "--deterministic", "--output", folder]) == 0
"""
    for model in ("smallnet", "resnet18"):
        folders = [tmp_path / f"{model}-{i}" for i in (0, 1)]
        command = [sys.executable, "-c", script, model, *map(str, folders)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)
        one, two = (
            torch.load(folder / "checkpoints" / "last.pt", map_location="cpu", weights_only=False)
            for folder in folders
        )
        for name, value in one["model"].items():
            assert torch.equal(value, two["model"][name]), (model, name)
