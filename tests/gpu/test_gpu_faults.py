"""What a run on a GPU survives: a stop in mid-epoch, a killed worker, too large a batch."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.training_step import synthetic_trainer
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from pipelines.backends import make_loader
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.loader import Loader, LoaderSpec, Stage
from tests.commands import start, stop_soon, train
from tests.test_faults import wait_for, workers

EPOCHS = 30
LONG = [
    *("--recipe", "tests/small.toml", "--device", "cuda", "--nproc-per-node", 1),
    *("--epochs", EPOCHS, "--set", "eval_every_epochs=10", "--checkpoint-steps", 5),
]
"""Of 500 images of CIFAR-10: 10 epochs of 10 updates at 8 px, 10 at 16 px, 10 of 20 at 24 px."""


def rest(loader: Loader, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """On the CPU, all batches that are left of so many epochs."""
    while loader.epoch < epochs:
        for images, labels in loader:
            yield images.float().cpu(), labels.cpu()


@pytest.mark.parametrize("steps", [2, 4, 5])
def test_mixed_decode_goes_on_with_the_same_labels_and_sizes(steps: int, photographs: Path) -> None:
    """From mid-epoch, and from one step before and at the change of size and batch size."""
    pytest.importorskip("nvidia.dali")
    spec = LoaderSpec(
        split=read_split(photographs, "train").take(np.arange(400)),
        stages=(
            Stage(epochs=1, image_size=96, batch_size=80),
            Stage(epochs=1, image_size=128, batch_size=100),
        ),
        training=True,
        device="cuda:0",
        half=True,
    )
    whole, resumed = make_loader("dali", spec), make_loader("dali", spec)
    batches = rest(whole, 2)
    for _ in range(steps):
        next(batches)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    count = 0
    for (images, labels), (again, same) in zip(batches, rest(resumed, 2), strict=True):
        assert torch.equal(labels, same)
        assert images.shape == again.shape
        # The hardware decoder need not take the same images again.
        assert (images - again).abs().mean() * 255 * 0.226 < 1
        count += 1
    assert count == 9 - steps
    whole.close()
    resumed.close()


def check_whole(folder: Path) -> None:
    """All updates are there once, at the plan's rates and sizes, and the run ended."""
    plan = json.loads((folder / "plan.json").read_text())
    rows = rows_of("step", read_rows(folder))
    assert sorted({row["step"] for row in rows}) == list(range(10, plan["total_steps"] + 1, 10))
    sizes = {row["epoch"]: row["image_size"] for row in rows_of("epoch", read_rows(folder))}
    expected = [phase["image_size"] for phase in plan["phases"] for _ in range(phase["epochs"])]
    assert [sizes[epoch] for epoch in range(EPOCHS)] == expected
    assert (folder / "summary.json").exists()


def test_a_stopped_run_goes_on(cifar10: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    flags = ["--data", cifar10, "--output", tmp_path / "run", *LONG, "--backend", "dali"]
    stop_soon(*flags)
    out, _ = train(*flags, "--resume", "auto")
    assert "resumed at step " in out
    check_whole(tmp_path / "run")


def test_a_killed_worker_is_started_again_from_the_last_checkpoint(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchrun asks for GPUs, and its workers are forked from it here: CUDA must not have begun.
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    folder = tmp_path / "run"
    agent = ["--standalone", "--nproc-per-node", 1, "--max-restarts", 2]
    flags = ["--data", cifar10, "--output", folder, *LONG, "--resume", "auto"]
    command = [*agent, "-m", "fastimagenet.train", *flags]
    process = start("torch.distributed.run", *command)
    wait_for((folder / "checkpoints" / "last.pt").exists, process)
    os.kill(workers(process)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "resumed at step " in out
    check_whole(folder)


class Little:
    """Two GiB of the GPU for this process, until it is left."""

    def __enter__(self) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_batch_that_does_not_fit_is_named_and_a_smaller_one_trains() -> None:
    """In the same process: what the first one took is given back."""
    recipe = Recipe(
        name="test",
        phases=(Phase(epochs=1, image_size=224, batch_size=512),),
        max_lr=0.01,
        schedule="piecewise",
        lr_spans=((0, 1, 1, 1),),
        precision="bf16",
    )
    smaller = replace(recipe, phases=(Phase(epochs=1, image_size=64, batch_size=16),))
    with Little():
        with pytest.raises(UserError, match=r"batch_size 512 at 224 px: --set phases\.0\.batch"):
            synthetic_trainer(recipe, "cuda:0", 10).fit()
        gc.collect()  # the error holds on to frames, and these to tensors
        torch.cuda.empty_cache()
        trainer = synthetic_trainer(smaller, "cuda:0", 10)
        trainer.fit()
    assert trainer.step == 2


def test_the_command_that_runs_out_of_memory_ends_with_one_line(
    photographs: Path, tmp_path: Path
) -> None:
    """The recipe `imagenet` in fp32 with 110 images in a batch at 1,024 px, some 250 GB; the
    largest tensor has less than 2^31 elements."""
    phases = "phases=[{epochs=1,image_size=1024,batch_size=110}]"
    flags = ["--set", phases, "--set", "lr_spans=[[0,1,1,1]]", "--precision", "fp32"]
    flags += ["--device", "cuda", "--nproc-per-node", 1, "--backend", "synthetic"]
    flags += ["--output", tmp_path / "run"]
    _, err = train("--data", photographs, "--recipe", "imagenet", *flags, status=2)
    assert "is out of memory with batch_size 110 at 1024 px" in err
    assert "Traceback" not in err
