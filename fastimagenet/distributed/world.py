"""`World`, who this process is, and `Launch`, what a command asks for.

The only reader of RANK, WORLD_SIZE and SLURM_*.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from dataclasses import dataclass

from pipelines.errors import UserError

TIMEOUT_SECONDS = 600
"""How long a process waits for the others, unless --timeout says so."""
LAUNCHER = "FASTIMAGENET_LAUNCHER"
"""Variable with the process number of our own launcher."""
STARTED = "FASTIMAGENET_STARTED"
"""Variable with the time at which that was started, in seconds since 1970."""
STOPPED = (130, 143)
"""Exit status of a process that was asked to stop, and has saved."""


@dataclass(frozen=True)
class World:
    """This process among all of the run's."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Processes on this machine."""
    device: str = "cpu"
    """ "cpu" or "cuda:LOCAL_RANK"."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0


@dataclass(frozen=True)
class Launch:
    """How many processes a command asks for."""

    nodes: int
    nproc_per_node: int
    device: str
    """ "cpu" or "cuda"."""
    rdzv_endpoint: str | None = None
    max_restarts: int = 0
    """How often the agent of a node starts all processes again after one has died."""
    min_nodes: int = 0
    """Above 0: nodes may leave and come back while there are so many."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.nproc_per_node


def gpu_count() -> int:
    """CUDA devices that this process may use, asked of the driver without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def plan_launch(
    nodes: int,
    nproc_per_node: int | None,
    device: str,
    endpoint: str | None,
    min_nodes: int = 0,
) -> Launch:
    """Settle device and process count from the flags. Raises UserError naming the flag."""
    gpus = gpu_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: no CUDA device is there; --device cpu runs without one")
    if nodes < 1:
        raise UserError(f"--nodes must be at least 1, not {nodes}")
    processes = nproc_per_node
    if processes is None:
        processes = gpus if device == "cuda" else 1
    if processes < 1:
        raise UserError(f"--nproc-per-node must be at least 1, not {processes}")
    if device == "cuda" and processes > gpus:
        raise UserError(f"--nproc-per-node {processes}: this machine has {gpus} CUDA devices")
    return Launch(nodes, processes, device, endpoint, min_nodes=min_nodes)


def launched_world(launch: Launch, nproc_flag: int | None = None) -> World | None:
    """The World that torchrun, srun or our own launcher has put this process in; None before that.

    Raises UserError where what was launched differs from what the flags say, of which `nproc_flag`
    is --nproc-per-node, and where a variable of the launcher is missing or no number.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = _number("RANK"), _number("WORLD_SIZE", least=1)
        local_rank = _number("LOCAL_RANK", "0")
        local_size = _number("LOCAL_WORLD_SIZE", "1", least=1)
        nodes = _number("GROUP_WORLD_SIZE", str(launch.nodes), least=1)
        starter = f"torchrun --nnodes {launch.nodes}"
        if "LOCAL_WORLD_SIZE" in env and nproc_flag not in (None, local_size):
            raise UserError(
                f"--nproc-per-node {nproc_flag}, but {local_size} process(es) of this machine were "
                f"launched: start it with torchrun --nproc-per-node {nproc_flag} or say "
                f"--nproc-per-node {local_size}"
            )
    elif "SLURM_PROCID" in env and _number("SLURM_NTASKS", "1", least=1) > 1:
        rank, size = _number("SLURM_PROCID"), _number("SLURM_NTASKS", least=1)
        local_rank = _number("SLURM_LOCALID")
        nodes = _number("SLURM_NNODES", least=1)
        local_size = size // nodes
        starter = f"srun --nodes {launch.nodes}"
        env.setdefault("MASTER_ADDR", _first_host(_variable("SLURM_JOB_NODELIST")))
        env.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID") % 20000))
    else:
        return None
    if not (launch.min_nodes or launch.nodes) <= nodes <= launch.nodes:
        raise UserError(
            f"--nodes {launch.nodes}, but {nodes} node(s) were launched: "
            f"start it with {starter} or say --nodes {nodes}"
        )
    return World(rank, local_rank, size, local_size, _device(launch.device, local_rank))


def _variable(name: str, default: str | None = None) -> str:
    text = os.environ.get(name, default)
    if not text:
        raise UserError(f"environment variable {name} is missing: torchrun and srun set all theirs")
    return text


def _number(name: str, default: str | None = None, least: int = 0) -> int:
    text = _variable(name, default)
    if not text.isdecimal() or int(text) < least:
        rule = f"a whole number of at least {least}, as torchrun and srun set it"
        raise UserError(f"environment variable {name} must be {rule}, not {text!r}")
    return int(text)


def _device(kind: str, local_rank: int) -> str:
    if kind == "cpu":
        return "cpu"
    gpus = gpu_count()
    if gpus > 1 and local_rank >= gpus:
        raise UserError(f"process {local_rank} of this machine has no GPU: it has {gpus}")
    # srun --gpus-per-task=1 shows each process its own GPU alone.
    return f"cuda:{local_rank if gpus > 1 else 0}"


def _first_host(node_list: str) -> str:
    """The first name of a SLURM node list, such as "gpu[03-06,9],login1" -> "gpu03"."""
    first = re.match(r"([^,\[]|\[[^]]*\])+", node_list)
    assert first is not None
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first.group())


def started_by_us() -> bool:
    """Whether our own launcher, which has checked flags and data, started this process."""
    return LAUNCHER in os.environ and "RANK" in os.environ


def restarted() -> bool:
    """Whether torch's elastic agent has started the processes of this run before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launched_before(moment: float) -> bool:
    """Whether the run that this process belongs to was under way at `moment`, in seconds since
    1970: what is from then is its own."""
    return float(os.environ[STARTED]) <= moment if started_by_us() else restarted()


def seconds_since_launch() -> float:
    """From the start of the command, which checked data and met other nodes, to that of this
    process; 0 where our own launcher did not start it."""
    return max(0.0, time.time() - float(os.environ[STARTED])) if started_by_us() else 0.0


def report_to_launcher(error: Exception) -> bool:
    """Leave the error to our launcher, which says it once; False where there is none."""
    if not started_by_us():
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return True


def end_with_launcher() -> None:
    """Have the kernel kill this process when our launcher is gone: nobody else would stop it."""
    if not started_by_us():
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if str(os.getppid()) != os.environ[LAUNCHER]:  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)
