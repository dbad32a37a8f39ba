"""`World`, this process among all, and `Launch`, the processes that a command asks for.

The only module that reads RANK, WORLD_SIZE and SLURM_*.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import time
from dataclasses import dataclass, replace

from pipelines.errors import UserError
from pipelines.signals import STOP_SIGNALS

TIMEOUT_SECONDS = 600
"""Default of --timeout, how long a process waits for the others."""
LAUNCHER = "FASTIMAGENET_LAUNCHER"
"""Environment variable with the process ID of our own launcher."""
STARTED = "FASTIMAGENET_STARTED"
"""Environment variable with the time at which that was started, in seconds since 1970."""
STOPPED = tuple(128 + number for number in STOP_SIGNALS)
"""Exit statuses of a process that was asked to stop, and had nothing left to save."""


@dataclass(frozen=True)
class World:
    """Identifies this process among all processes of the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Number of processes on this node."""
    device: str = "cpu"
    """ "cpu" or "cuda:LOCAL_RANK"."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


@dataclass(frozen=True)
class Launch:
    """The processes that a command asks for."""

    nodes: int = 1
    nproc_per_node: int | None = None
    """None: one per GPU, one on a CPU."""
    device: str = "auto"
    """ "auto", "cuda" or "cpu"; "auto" is "cuda" where there is a GPU."""
    rdzv_endpoint: str | None = None
    """HOST:PORT where several nodes meet."""
    max_restarts: int = 3
    """How often the processes of a node are restarted after one has died."""
    min_nodes: int = 0
    """Above 0: elastic, nodes may leave and join while there are so many."""
    timeout_seconds: float = TIMEOUT_SECONDS
    """How long a process waits for the others in a collective."""

    def resolved(self) -> Launch:
        """Return a copy with device and processes per node settled for this node.

        Raises UserError naming the flag.
        """
        gpus, device = gpu_count(), self.device
        if device not in ("auto", "cuda", "cpu"):
            raise UserError(f"--device must be one of auto, cuda, cpu, not {device!r}")
        if device == "auto":
            device = "cuda" if gpus else "cpu"
        if device == "cuda" and not gpus:
            raise UserError("--device cuda: no CUDA device is there; --device cpu runs without one")
        if self.nodes < 1:
            raise UserError(f"--nodes must be at least 1, not {self.nodes}")
        if not 0 < self.timeout_seconds < math.inf:
            raise UserError(f"--timeout must be above 0 seconds, not {self.timeout_seconds:g}")
        if self.max_restarts < 0:
            raise UserError(f"--max-restarts must be 0 or more, not {self.max_restarts}")
        processes = self.nproc_per_node
        if processes is None:
            processes = gpus if device == "cuda" else 1
        if processes < 1:
            raise UserError(f"--nproc-per-node must be at least 1, not {processes}")
        if device == "cuda" and processes > gpus:
            raise UserError(f"--nproc-per-node {processes}: this machine has {gpus} CUDA devices")
        return replace(self, nproc_per_node=processes, device=device)

    @property
    def processes(self) -> int:
        """Number of processes per node, once `resolved`."""
        assert self.nproc_per_node is not None, "resolved() comes first"
        return self.nproc_per_node

    @property
    def world_size(self) -> int:
        """Number of processes on all nodes, once `resolved`."""
        return self.nodes * self.processes

    @property
    def first_device(self) -> str:
        """Device of a process that runs alone, once `resolved`: "cpu" or "cuda:0"."""
        return "cpu" if self.device == "cpu" else "cuda:0"


def gpu_count() -> int:
    """Count the CUDA devices that this process may use; asks the driver, without torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def launched_world(launch: Launch) -> World | None:
    """Read the World that torchrun, srun or our own launcher set; None if none has started us.

    Raises UserError where what was launched differs from what `launch` asks for, and where a
    variable of the launcher is missing or no number.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = _number("RANK"), _number("WORLD_SIZE", least=1)
        local_rank = _number("LOCAL_RANK", "0")
        local_size = _number("LOCAL_WORLD_SIZE", "1", least=1)
        nodes = _number("GROUP_WORLD_SIZE", str(launch.nodes), least=1)
        starter = f"torchrun --nnodes {launch.nodes}"
        if "LOCAL_WORLD_SIZE" in env and launch.nproc_per_node not in (None, local_size):
            raise UserError(
                f"--nproc-per-node {launch.nproc_per_node}, but {local_size} process(es) of this "
                f"node were launched: start it with torchrun --nproc-per-node "
                f"{launch.nproc_per_node} or say --nproc-per-node {local_size}"
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
    return World(rank, local_rank, size, local_size, _device(launch.resolved().device, local_rank))


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
        raise UserError(f"process {local_rank} of this node has no GPU: it has {gpus}")
    # srun --gpus-per-task=1 shows each process its own GPU alone.
    return f"cuda:{local_rank if gpus > 1 else 0}"


def _first_host(node_list: str) -> str:
    """Return the first name of a SLURM node list: "gpu[03-06,9],login1" -> "gpu03"."""
    first = re.match(r"([^,\[]|\[[^]]*\])+", node_list)
    assert first is not None
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first.group())


def started_by_us() -> bool:
    """Tell whether our own launcher, which has checked flags and data, started this process."""
    return LAUNCHER in os.environ and "RANK" in os.environ


def restarted() -> bool:
    """Tell whether torch's elastic agent has restarted this process."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launched_before(moment: float) -> bool:
    """Tell whether this process's run had begun at `moment`, in seconds since 1970.

    A checkpoint of that time is then the run's own.
    """
    return float(os.environ[STARTED]) <= moment if started_by_us() else restarted()


def seconds_since_launch() -> float:
    """Return the seconds from the start of the command, which checked the data and met the other
    nodes, to that of this process; 0 where our own launcher did not start it."""
    return max(0.0, time.time() - float(os.environ[STARTED])) if started_by_us() else 0.0


def report_to_launcher(error: Exception) -> bool:
    """Hand the error to our launcher, which prints it once; False without a launcher."""
    if not started_by_us():
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return True


def end_with_launcher() -> None:
    """Have the kernel kill this process when our launcher dies, since nobody else would."""
    if not started_by_us():
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if str(os.getppid()) != os.environ[LAUNCHER]:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
