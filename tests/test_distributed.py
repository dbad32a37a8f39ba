"""Who launched us and how: torchrun, srun, our own launcher; and the messages for mismatches."""

from __future__ import annotations

import os
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
    step_of_job,
)
from pipelines.errors import UserError

LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    *(f"SLURM_{name}" for name in ("PROCID", "LOCALID", "NTASKS", "NNODES", "JOB_ID")),
    *(f"SLURM_STEP_{name}" for name in ("ID", "NUM_TASKS", "NUM_NODES", "NODELIST")),
)
MET = "MASTER_ADDR=node0 MASTER_PORT=29500"
STEP = "SLURM_JOB_ID=77 SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=2"
SRUN = f"{STEP} SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=gpu[03-04]"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.setenv(name, "")  # to be as it was after the test, whatever that sets
        monkeypatch.delenv(name)


def have(monkeypatch: pytest.MonkeyPatch, variables: str) -> None:
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("=", 1))


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
    have(
        monkeypatch, f"RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 GROUP_WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 {MET}"
    )
    monkeypatch.setattr("fastimagenet.distributed.world.gpu_count", lambda: 2)
    assert launched_world(Launch(2, None, "cuda")) == World(3, 1, 4, 2, "cuda:1")
    monkeypatch.setattr("fastimagenet.distributed.world.gpu_count", lambda: 1)
    world = launched_world(Launch(2, None, "cuda"))
    assert world is not None and world.device == "cuda:0"
    with pytest.raises(UserError, match=r"--nodes 1, but 2 node\(s\) were launched: .*torchrun"):
        launched_world(Launch(1, None, "cpu"))


def test_torchruns_processes_are_those_of_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, f"RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 {MET}")
    assert launched_world(Launch(1, 2, "cpu")) == launched_world(Launch(1, None, "cpu"))
    with pytest.raises(UserError, match=r"--nproc-per-node 4, but 2 process.*torchrun --nproc-per"):
        launched_world(Launch(1, 4, "cpu"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("RANK=x WORLD_SIZE=2", "variable RANK must be a whole number of at least 0, .* not 'x'"),
        ("RANK=0 WORLD_SIZE=0", "variable WORLD_SIZE must be a whole number of at least 1"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=-1", "variable LOCAL_RANK must be"),
        ("RANK=0", "variable WORLD_SIZE is missing"),
        ("WORLD_SIZE=2", "variable RANK is missing"),
        ("RANK=2 WORLD_SIZE=2", "variable RANK is 2, but WORLD_SIZE is 2: it goes from 0 to 1"),
        (
            "RANK=1 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2",
            "variable LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2",
        ),
        ("RANK=0 WORLD_SIZE=2", "variable MASTER_ADDR is missing"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=node0", "variable MASTER_PORT is missing"),
        (
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=node0 MASTER_PORT=abc",
            "variable MASTER_PORT must be a whole number from 1 to 65535, .* not 'abc'",
        ),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=node0 MASTER_PORT=65536", "MASTER_PORT must be"),
        ("SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=two", "variable SLURM_STEP_NUM_TASKS must be"),
        (STEP.replace("SLURM_LOCALID=0", ""), "variable SLURM_LOCALID is missing"),
        (STEP.replace("PROCID=1", "PROCID=2"), "variable SLURM_PROCID is 2, but SLURM_STEP_NUM_"),
        (STEP, "variable SLURM_STEP_NUM_NODES is missing"),
        (f"{STEP} SLURM_STEP_NUM_NODES=1", "variable SLURM_STEP_NODELIST is missing"),
        (f"{SRUN} MASTER_PORT=abc", "variable MASTER_PORT must be"),
        ("OMPI_COMM_WORLD_SIZE=2", "mpirun has started 2 processes .* torchrun or srun"),
        ("PMI_SIZE=4", "mpirun has started 4 processes"),
    ],
)
def test_a_launchers_variables_are_named(
    variables: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, variables)
    with pytest.raises(UserError, match=message):
        launched_world(Launch(1, 1, "cpu"))


@pytest.mark.parametrize(
    ("variables", "launch", "message"),
    [
        (SRUN, Launch(3, None, "cpu"), "--nodes 3, but 2 .* start it with srun --nodes 3 or say"),
        (
            SRUN,
            Launch(2, 4, "cpu"),
            r"--nproc-per-node 4, but 1 .* srun --ntasks-per-node 4 or",
        ),
        (
            SRUN.replace("NUM_TASKS=2", "NUM_TASKS=3"),
            Launch(2, 1, "cpu"),
            r"--nproc-per-node 1, but 3 on 2 node\(s\) were launched: .* or leave it out",
        ),
        (SRUN, Launch(2, 1, "cpu", "a:1"), "--rdzv-endpoint a:1: what srun has .*: leave it out"),
        (f"RANK=0 WORLD_SIZE=4 {MET}", Launch(1, 2, "cpu"), "--nproc-per-node 2, but 4 process"),
        (f"RANK=0 WORLD_SIZE=3 {MET}", Launch(2, 1, "cpu"), "--nproc-per-node 1, but 3 on 2 node"),
        (
            f"RANK=0 WORLD_SIZE=2 {MET}",
            Launch(1, 2, "cpu", "a:1"),
            "--rdzv-endpoint a:1: what torc",
        ),
    ],
)
def test_a_flag_that_contradicts_the_launcher_is_refused(
    variables: str, launch: Launch, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, variables)
    with pytest.raises(UserError, match=message):
        launched_world(launch)


@pytest.mark.parametrize(
    "variables",
    [
        "SLURM_JOB_ID=77 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4 SLURM_NNODES=1",  # sbatch
        "SLURM_JOB_ID=77 SLURM_NTASKS=4 SLURM_STEP_ID=4294967290 SLURM_STEP_NUM_TASKS=1 PMI_SIZE=1",
    ],
)
def test_a_batch_script_or_an_interactive_shell_is_no_launch(
    variables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, variables)
    assert launched_world(Launch(1, 2, "cpu")) is None


def test_variables_by_hand_are_of_as_many_processes_as_the_flags_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have(monkeypatch, f"RANK=3 WORLD_SIZE=4 {MET}")
    assert launched_world(Launch(1, None, "cpu")) == World(3, 3, 4, 4, "cpu")
    assert launched_world(Launch(2, 2, "cpu")) == World(3, 1, 4, 2, "cpu")


def test_steps_of_a_job_meet_at_ports_and_by_names_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met = set()
    for job in ("77", "78"):
        for step in range(8):
            have(monkeypatch, f"{SRUN} SLURM_JOB_ID={job} SLURM_STEP_ID={step}")
            monkeypatch.delenv("MASTER_PORT", raising=False)
            launched_world(Launch(2, 1, "cpu"))
            assert 20000 <= int(os.environ["MASTER_PORT"]) < 32000  # those above may be taken
            assert step_of_job() == f"job {job}, step {step}"
            met.add(os.environ["MASTER_PORT"])
    assert len(met) == 16


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
    """The first node is that of the step, which need not have all of the job."""
    have(monkeypatch, f"{SRUN} SLURM_JOB_NODELIST=other WORLD_SIZE=2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    assert launched_world(Launch(2, 1, "cpu")) == World(1, 0, 2, 1, "cpu")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (first, "20077")


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
