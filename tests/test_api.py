"""The Python API: the same calls as the commands', lazy, with errors that name the argument."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastimagenet
from fastimagenet.api import _config
from fastimagenet.cli import run_config
from fastimagenet.config import DataConfig, EntryFacts, RunConfig
from fastimagenet.distributed.processes import Processes
from fastimagenet.distributed.world import Launch
from fastimagenet.errors import PeerLost
from fastimagenet.train import main, parser
from fastimagenet.training.recorder import read_rows
from pipelines.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"recipe": "tests/small.toml", "device": "cpu"}


def rows(folder: Path) -> list[dict[str, object]]:
    """The rows without what a clock has measured."""
    return [
        {key: value for key, value in row.items() if "seconds" not in key and "sec" not in key}
        for row in read_rows(folder)
    ]


def test_train_does_what_the_command_does(cifar10: Path, tmp_path: Path) -> None:
    run = fastimagenet.train(
        cifar10, output=tmp_path / "python", epochs=2, set={"max_lr": 0.05}, seed=3, **SMALL
    )
    folder = tmp_path / "command"
    flags = ["--recipe", "tests/small.toml", "--device", "cpu", "--epochs", "2", "--seed", "3"]
    flags += ["--data", str(cifar10), "--output", str(folder), "--set", "max_lr=0.05"]
    assert main(flags) == 0
    assert rows(run.folder) == rows(folder)
    assert [row["epoch"] for row in run.epochs] == [0, 1]
    assert run.epochs[-1]["top1"] == run.summary["top1"]
    assert fastimagenet.Run.open(folder).plan["recipe"] == run.plan["recipe"]


def test_torch_is_imported_when_it_is_needed_and_train_stays_a_function() -> None:
    code = """
import sys, fastimagenet
assert callable(fastimagenet.train) and fastimagenet.recipe("digits").model == "smallnet"
assert "torch" not in sys.modules and set(fastimagenet.__all__) <= set(dir(fastimagenet))
import fastimagenet.train, fastimagenet.lr_find
assert callable(fastimagenet.train) and callable(fastimagenet.lr_find)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastimagenet.train(epoch=1), "there is no argument epoch: "),
        (lambda: fastimagenet.train(sede=1), "there is no argument sede: did you mean seed?"),
        (lambda: fastimagenet.train(recipe=3), "recipe must be str or Recipe or None, not 3"),
        (
            lambda: fastimagenet.train(recipe="digit"),
            "--recipe digit is neither a recipe nor a .toml file: did you mean digits?",
        ),
        (lambda: fastimagenet.train(epochs=1.5), "epochs must be int or None, not 1.5"),
        (lambda: fastimagenet.train(epochs=0), "--epochs must be at least 1, not 0"),
        (lambda: fastimagenet.train(set={"max_lrr": 1}), "field max_lrr: did you mean max_lr?"),
        (lambda: fastimagenet.train(set=["max_lr=1"]), "set must be Mapping or None, not"),
        (lambda: fastimagenet.train(seed=True), "seed must be int, not True"),
        (lambda: fastimagenet.train(seed=-1), "--seed must be from 0"),
        (lambda: fastimagenet.train(backend="x"), "--backend must be one of auto, dali"),
        (lambda: fastimagenet.train(device="gpu"), "--device must be one of auto, cuda, cpu"),
        (lambda: fastimagenet.train("/nowhere"), "no folder /nowhere"),
        (lambda: fastimagenet.train(author=" "), "--author must not be empty"),
        (lambda: fastimagenet.loader(None, "test", image_size=8, batch_size=1), "split must be"),
        (lambda: fastimagenet.loader(image_size=7, batch_size=1), "image_size must be at least 8"),
        (lambda: fastimagenet.loader(image_size=8, batch_size="x"), "batch_size must be int"),
        (
            lambda: fastimagenet.loader(image_size=8, batch_size=1, mirorr=True),
            "there is no argument mirorr: did you mean mirror?",
        ),
        (
            lambda: fastimagenet.loader(image_size=8, batch_size=1, auto_augment="trival"),
            "field auto_augment must be one of none, trivial, rand (perhaps trivial), not 'trival'",
        ),
        (lambda: fastimagenet.loader(image_size=8, batch_size=1, device="cuda"), 'or "cuda:INDEX"'),
        (lambda: fastimagenet.loader(image_size=8, batch_size=1, seed=-1), "--seed must be from 0"),
        (
            lambda: fastimagenet.loader(image_size=8, batch_size=1, num_threads=0),
            "num_threads must",
        ),
        (lambda: fastimagenet.train(log=["csw"]), "--log must be one of tensorboard"),
        (lambda: fastimagenet.train(log=3), "log must be str, not 3"),
        (lambda: fastimagenet.train(resume="runs/x/best.pt"), "in no run's folder: name an --outp"),
        (lambda: fastimagenet.train(resume="tests"), "--resume tests is a folder: --output tests"),
        (lambda: fastimagenet.train("s3://"), "s3:// names no bucket"),
        (lambda: fastimagenet.lr_find(num_it=1e2), "num_it must be int, not 100.0"),
        (lambda: fastimagenet.lr_find(resume="auto"), "lr_find has no argument resume"),
        (lambda: fastimagenet.lr_find(start_lr=0), "--start-lr must be above 0"),
        (lambda: fastimagenet.lr_find(wds="x"), "wds must be float, not 'x'"),
        (lambda: fastimagenet.lr_find(numit=3), "there is no argument numit"),
        (
            lambda: fastimagenet.recipe("digitz"),
            "--recipe digitz is neither a recipe nor a .toml file: did you mean digits?",
        ),
        (lambda: fastimagenet.Run.open("/nowhere"), "/nowhere/plan.json: no such file"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)


def test_a_run_whose_processes_have_failed_is_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And of several nodes the folder is the one that was asked for."""
    monkeypatch.setattr(Processes, "run", lambda *_, **__: 137)
    with pytest.raises(PeerLost, match="a process has ended with status 137"):
        fastimagenet.train(output=tmp_path / "one", **SMALL)
    monkeypatch.setattr(Processes, "run", lambda *_, **__: 130)
    with pytest.raises(KeyboardInterrupt):
        fastimagenet.train(output=tmp_path / "one", **SMALL)
    several = {"nodes": 2, "rdzv_endpoint": "localhost:1", "output": tmp_path / "two"}
    monkeypatch.setattr(Processes, "run", lambda *_, **__: 0)
    with pytest.raises(UserError, match=r"two/plan\.json: no such file"):
        fastimagenet.train(**several, **SMALL)


def test_a_config_takes_one_tool_or_several() -> None:
    for log in ("csv", ["csv"], ("csv",)):
        assert _config(None, None, None, None, None, {"log": log}).log == ("csv",)


def test_a_loader_reads_batches(cifar10: Path) -> None:
    with closing(
        fastimagenet.loader(cifar10, "train", image_size=16, batch_size=20, mirror=False)
    ) as loader:
        images, labels = next(iter(loader))
    assert images.shape == (20, 3, 16, 16) and images.dtype == torch.float32
    assert labels.shape == (20,) and labels.dtype == torch.int64
    with closing(fastimagenet.loader(cifar10, "val", image_size=16, batch_size=150)) as loader:
        assert [len(labels) for _, labels in loader] == [150, 50]


def test_a_trainer_takes_any_module(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README shows: a plan, a network of one's own, and two loaders."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    before = model[2].weight.detach().clone()
    monkeypatch.setattr("torchvision.models.mobilenet_v3_small", lambda num_classes: model)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "Trainer(" in block)
    for theirs, ours in (('"photos"', repr(str(cifar10))), ("epochs=5", "epochs=1"), ("96", "8")):
        assert theirs in code
        code = code.replace(theirs, ours)
    found: dict[str, Any] = {}
    exec(code, found)
    trainer = found["trainer"]
    assert trainer.step == 500 // 32 and not torch.equal(model[2].weight, before)
    assert trainer.records[-1].top1 is not None


def test_a_config_is_its_flags() -> None:
    recipe = fastimagenet.recipe("cifar10-speed")
    phases = (replace(recipe.phases[0], epochs=7), recipe.phases[1])
    config = RunConfig(
        recipe=replace(recipe, phases=phases, lr_spans=((0, 12, 1.0, 0.0),), nesterov=False),
        data=DataConfig(folder=Path("photos"), on_bad_image="skip", backend="memory"),
        launch=Launch(nproc_per_node=2, device="cpu", timeout_seconds=30, max_restarts=1),
        output=Path("runs/x"),
        seed=4,
        global_batch=4000,
        stop_at_target=True,
        entry=EntryFacts(author="A B", cost_per_hour=1.5),
    )
    args = parser().parse_args(config.flags())
    told = run_config(
        args,
        stop_at_target=args.stop_at_target,
        entry=EntryFacts(author=args.author, cost_per_hour=args.cost_per_hour),
    )
    assert told == config
    assert RunConfig(recipe=fastimagenet.recipe("digits")).flags() == [
        *("--recipe", "digits", "--nodes", "1")
    ]
