"""The files in examples/ for clusters: a SLURM job, a container, a Kubernetes job."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser

from fastimagenet import cli
from fastimagenet.distributed.world import launched_world
from fastimagenet.report.run import rows_of
from fastimagenet.train import parser
from fastimagenet.training import checkpoint
from fastimagenet.training.recorder import StepRecord, read_rows
from tests.commands import ROOT, losses_of
from tests.forked import Forked

EXAMPLES = ROOT / "examples"
STAND_IN = "STAND_IN"
"""Environment variable with the folder that the stand-ins in tests/slurm share with the test."""
TASKS = 2
HELD_AT = 5
"""The last step of the first epoch."""


def wait_for(condition: Callable[[], object], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def held(**fields: Any) -> StepRecord:
    """Make a row; that of HELD_AT waits until the tasks have been warned."""
    folder = Path(os.environ[STAND_IN])
    if fields["step"] == HELD_AT:
        (folder / f"held-{os.environ['SLURM_PROCID']}").touch()
        while not (folder / "warned").exists():
            time.sleep(0.01)
    return StepRecord(**fields)


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Submit the example with these arguments, in an empty folder."""
    monkeypatch.setenv("PATH", f"{ROOT / 'tests' / 'slurm'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(STAND_IN, str(tmp_path))

    def submitted(*words: object) -> subprocess.Popen[str]:
        command = ["sbatch", str(EXAMPLES / "slurm.sbatch"), *map(str, words)]
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return submitted


def words_of(step: int, folder: Path, job: subprocess.Popen[str]) -> list[str]:
    """What the job's srun was asked for: the signal that warns it, and the command."""
    path = folder / f"step-{step}.words"
    wait_for(path.exists, job)
    return path.read_text().split("\0")[:-1]


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_goes_on_bit_for_bit(
    submit: Any, cifar10: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two starts of two tasks; the first ones are warned, and stop in the evaluation to come."""
    recipe = ("--recipe", ROOT / "tests" / "small.toml", "--device", "cpu")
    job = submit("--data", cifar10, *recipe, "--checkpoint-steps", 3)
    said = ""
    for step in (0, 1):
        warning, python, dash_m, *command = words_of(step, tmp_path, job)
        assert (python, dash_m) == ("python", "-m")
        tasks = []
        for rank in range(TASKS):
            slurm = {
                **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": str(step), "SLURM_STEP_NUM_NODES": "1"},
                **{"SLURM_STEP_NUM_TASKS": str(TASKS), "SLURM_STEP_NODELIST": "localhost"},
                **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            }
            with patch.dict(os.environ, slurm):
                patches: dict[str, object] = {"fastimagenet.training.trainer.StepRecord": held}
                tasks.append(Forked(*command, cwd=tmp_path, patches=patches))
        if step == 0:
            ranks = [tmp_path / f"held-{rank}" for rank in range(TASKS)]
            wait_for(lambda: all(map(Path.exists, ranks)), job)  # noqa: B023
            for task in tasks:
                task.send_signal(signal.Signals[f"SIG{warning}"])
            (tmp_path / "warned").touch()
        for task in tasks:
            out, err = task.communicate(timeout=300)
            said += out + err
        (tmp_path / "status").write_text(str(max(task.returncode or 0 for task in tasks)))
        (tmp_path / "status").rename(tmp_path / f"step-{step}.status")
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, said + out + err
    folder = tmp_path / "runs" / "slurm-7"
    assert [row["message"] for row in rows_of("event", read_rows(folder))] == [
        f"stopped and saved at step {HELD_AT}",
        f"resumed at step {HELD_AT}",
    ]
    assert losses_of(folder) == losses_of(undisturbed)
    one, two = (checkpoint.load(f / "checkpoints" / "last.pt") for f in (folder, undisturbed))
    for name, value in two["model"].items():
        assert torch.equal(one["model"][name], value), name


def test_a_job_that_fails_is_not_queued_again(submit: Any, tmp_path: Path) -> None:
    job = submit("--data", "nowhere")
    words = words_of(0, tmp_path, job)
    assert words[-2:] == ["--data", "nowhere"]
    (tmp_path / "step-0.status").write_text("2")
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (2, "")
    assert not (tmp_path / "step-1.words").exists()


def test_the_kubernetes_job_is_what_torchrun_and_the_command_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the variables that the training operator sets."""
    spec = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text(encoding="utf-8"))["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    nodes, processes = sum(each["replicas"] for each in replicas.values()), spec["nprocPerNode"]
    monkeypatch.setenv("PET_NNODES", str(nodes))
    monkeypatch.setenv("PET_NPROC_PER_NODE", processes)
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == processes
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        torchrun, *words = [*container["command"], *container["args"]]
        launch = get_args_parser().parse_args(words)
        assert (torchrun, launch.module, launch.training_script) == (
            "torchrun", True, "fastimagenet.train",
        )  # fmt: skip
        assert (launch.nnodes, launch.nproc_per_node) == (str(nodes), processes)
        args = parser().parse_args(launch.training_script_args)
        assert args.resume == "auto"
        assert args.data.is_relative_to("/data") and mounts["/data"] == "data"
        assert args.output.is_relative_to("/runs") and mounts["/runs"] == "runs"
        size = nodes * int(processes)
        for name, value in {
            **{"RANK": size - 1, "WORLD_SIZE": size, "GROUP_WORLD_SIZE": nodes},
            **{"LOCAL_RANK": int(processes) - 1, "LOCAL_WORLD_SIZE": processes},
            **{"MASTER_ADDR": "fastimagenet-master-0", "MASTER_PORT": 23456},
        }.items():
            monkeypatch.setenv(name, str(value))
        args.device = "cpu"
        world = launched_world(cli.launch_of(args))
        assert world is not None and (world.rank, world.world_size) == (size - 1, size)


def test_the_container_runs_the_command_as_another_user_than_root() -> None:
    lines = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8").splitlines()
    steps = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    user = [name for word, name in steps if word == "USER"][-1]
    assert user not in ("root", "0")
    assert any(f"useradd --uid 1000 --create-home {user}" in text for _, text in steps)
    assert steps[-1] == ["ENTRYPOINT", '["fastimagenet"]']
    (example,) = (line for line in lines if line.startswith("#   --user"))
    words = shlex.split(example.lstrip("# "))
    args = parser().parse_args(words[words.index("train") + 1 :])
    assert args.output.is_relative_to("/runs")
