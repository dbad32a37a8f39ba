"""Who launched us and how: torchrun, srun, our own launcher; and the messages for mismatches."""

from __future__ import annotations

import socket
import time

import pytest

from fastimagenet.distributed.launch import run_processes
from fastimagenet.distributed.world import (
    LAUNCHER,
    STARTED,
    Launch,
    World,
    launched_before,
    launched_world,
    seconds_since_launch,
)
from pipelines.errors import UserError

LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_flags_settle_device_and_processes() -> None:
    assert Launch(1, None, "cpu", None).resolved() == Launch(1, 1, "cpu", None)
    assert Launch(2, 3, "cpu", "host:1").resolved().world_size == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, None, "cpu", None), "--nodes must be at least 1"),
        ((1, -1, "cpu", None), "--nproc-per-node must be at least 1"),
        ((1, 0, "cpu", None), "--nproc-per-node must be at least 1"),
    ],
)
def test_bad_flags_are_named(
    arguments: tuple[int, int | None, str, str | None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Launch(*arguments).resolved()


def test_a_cuda_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastimagenet.distributed.world.gpu_count", lambda: 0)
    with pytest.raises(UserError, match="--device cuda: no CUDA device is there"):
        Launch(1, None, "cuda", None).resolved()
    assert Launch(1, None, "auto", None).resolved().device == "cpu"


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastimagenet.distributed.world.gpu_count", lambda: 2)
    assert Launch(1, None, "auto", None).resolved() == Launch(1, 2, "cuda", None)
    with pytest.raises(UserError, match="--nproc-per-node 3: this machine has 2 CUDA devices"):
        Launch(1, 3, "cuda", None).resolved()


def test_torchruns_environment_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_world(Launch(1, 2, "cpu")) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_WORLD_SIZE": "2"}
    for name, value in (torchrun | {"LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("fastimagenet.distributed.world.gpu_count", lambda: 2)
    assert launched_world(Launch(2, None, "cuda")) == World(3, 1, 4, 2, "cuda:1")
    monkeypatch.setattr("fastimagenet.distributed.world.gpu_count", lambda: 1)
    world = launched_world(Launch(2, None, "cuda"))
    assert world is not None and world.device == "cuda:0"
    with pytest.raises(UserError, match=r"--nodes 1, but 2 node\(s\) were launched: .*torchrun"):
        launched_world(Launch(1, None, "cpu"))


def test_torchruns_processes_are_those_of_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert launched_world(Launch(1, 2, "cpu")) == launched_world(Launch(1, None, "cpu"))
    with pytest.raises(UserError, match=r"--nproc-per-node 4, but 2 process.*torchrun --nproc-per"):
        launched_world(Launch(1, 4, "cpu"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("RANK=x WORLD_SIZE=2", "variable RANK must be a whole number of at least 0, .* not 'x'"),
        ("RANK=0 WORLD_SIZE=0", "variable WORLD_SIZE must be a whole number of at least 1"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=-1", "variable LOCAL_RANK must be"),
        ("SLURM_PROCID=0 SLURM_NTASKS=two", "variable SLURM_NTASKS must be"),
        ("SLURM_PROCID=0 SLURM_NTASKS=2", "variable SLURM_LOCALID is missing"),
        ("SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0", "variable SLURM_NNODES is missing"),
        (
            "SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_NNODES=1",
            "variable SLURM_JOB_NODELIST is missing",
        ),
    ],
)
def test_a_launchers_variables_are_named(
    variables: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(UserError, match=message):
        launched_world(Launch(1, 1, "cpu"))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-06,9],login1", "gpu03"),
        ("n[01-03,7],gpu1", "n01"),
        ("alpha,beta", "alpha"),
        ("n-1-[7,8]", "n-1-7"),
        ("rack[2-3]n[05,07]", "rack2n05"),
        ("n[1-2]-ib,m3", "n1-ib"),
        ("alone", "alone"),
    ],
)
def test_sruns_environment_is_recognised(
    monkeypatch: pytest.MonkeyPatch, nodes: str, first: str
) -> None:
    srun = {"PROCID": "1", "NTASKS": "2", "LOCALID": "0", "NNODES": "2", "JOB_ID": "77"}
    for name, value in (srun | {"JOB_NODELIST": nodes}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launched_world(Launch(2, 1, "cpu")) == World(1, 0, 2, 1, "cpu")
    import os

    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (first, "20077")
    with pytest.raises(UserError, match="--nodes 3, but 2"):
        launched_world(Launch(3, 1, "cpu"))


@pytest.mark.parametrize(
    ("endpoint", "address"), [("127.0.0.1:29500", "127.0.0.1"), ("[::1]:29500", "::1")]
)
def test_where_nodes_meet_may_be_ipv4_and_ipv6(endpoint: str, address: str) -> None:
    from fastimagenet.distributed.launch import address_towards, interface_of

    try:
        socket.create_server((address, 0), family=socket.getaddrinfo(address, 0)[0][0]).close()
    except OSError:
        pytest.skip(f"this machine has no {address}")
    assert address_towards(endpoint) == (address, True)
    assert interface_of(address) == "lo"


@pytest.mark.parametrize("endpoint", ["host", "127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:-1"])
def test_where_nodes_meet_has_a_port(endpoint: str) -> None:
    from fastimagenet.distributed.launch import address_towards

    with pytest.raises(UserError, match="must be HOST:PORT, PORT from 1 to 65535, not"):
        address_towards(endpoint)


def test_several_nodes_need_a_place_to_meet() -> None:
    with pytest.raises(UserError, match="--nodes 2 needs --rdzv-endpoint HOST:PORT"):
        run_processes(Launch(2, 1, "cpu"), "fastimagenet.train", [])


def test_what_the_launcher_has_taken_counts_and_what_it_has_seen_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (LAUNCHER, STARTED, "RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert seconds_since_launch() == 0 and not launched_before(time.time())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # under torchrun
    assert seconds_since_launch() == 0 and launched_before(time.time())
    monkeypatch.setenv(LAUNCHER, "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(STARTED, str(time.time() - 60))
    assert 60 <= seconds_since_launch() < 70
    assert launched_before(time.time() - 50) and not launched_before(time.time() - 80)
