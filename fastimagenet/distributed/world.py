"""`World`, this process among all, and `Launch`, the processes that a command asks for.

The only module that reads RANK, WORLD_SIZE and SLURM_*.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import secrets
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
RUN = "FASTIMAGENET_RUN"
"""Environment variable with what our launchers have agreed to call the run: TIME-RANDOM."""
TIME_FORMAT = "%Y%m%d-%H%M%S"
TRAINED = "It had trained since its last start."
"""Note of an exception: another start may get further."""
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

    Raises UserError where what was launched differs from what `launch` asks for, where a variable
    of the launcher is missing or impossible, and for a launcher that is not known.
    """
    env = os.environ
    by_srun = "SLURM_STEP_ID" in env and _number("SLURM_STEP_NUM_TASKS", "1", least=1) > 1
    if "RANK" in env or ("WORLD_SIZE" in env and not by_srun):
        size = _number("WORLD_SIZE", least=1)
        rank = _index("RANK", "WORLD_SIZE", size)
        nodes = _number("GROUP_WORLD_SIZE", str(launch.nodes), least=1)
        even = str(max(1, size // nodes))
        local_size = _number("LOCAL_WORLD_SIZE", even, least=1)
        local_rank = _index("LOCAL_RANK", "LOCAL_WORLD_SIZE", local_size, str(rank % local_size))
        if size > 1:
            master()
        starter, node_flag, flag = "torchrun", "--nnodes", "--nproc-per-node"
        # torchrun's nodes may have different numbers of processes.
        uneven = "LOCAL_WORLD_SIZE" not in env and nodes * local_size != size
    elif by_srun:
        size = _number("SLURM_STEP_NUM_TASKS", least=1)
        rank = _index("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", size)
        local_rank = _number("SLURM_LOCALID")
        nodes = _number("SLURM_STEP_NUM_NODES", least=1)
        local_size = max(1, size // nodes)
        env.setdefault("MASTER_ADDR", _first_host(_variable("SLURM_STEP_NODELIST")))
        env.setdefault("MASTER_PORT", str(_port_of_step()))
        master()
        starter, node_flag, flag = "srun", "--nodes", "--ntasks-per-node"
        uneven = nodes * local_size != size
    else:
        _refuse_mpirun()
        return None
    if not (launch.min_nodes or launch.nodes) <= nodes <= launch.nodes:
        raise UserError(
            f"--nodes {launch.nodes}, but {nodes} node(s) were launched: start it with "
            f"{starter} {node_flag} {launch.nodes} or say --nodes {nodes}"
        )
    asked = launch.nproc_per_node
    if asked is not None and (asked != local_size or uneven):
        there = f"{size} on {nodes} node(s)" if uneven else f"{local_size} process(es) of this node"
        remedy = "leave it out" if uneven else f"say --nproc-per-node {local_size}"
        raise UserError(
            f"--nproc-per-node {asked}, but {there} were launched: "
            f"start it with {starter} {flag} {asked} or {remedy}"
        )
    if launch.rdzv_endpoint and not started_by_us():
        raise UserError(
            f"--rdzv-endpoint {launch.rdzv_endpoint}: what {starter} has launched "
            "meets at MASTER_ADDR and MASTER_PORT: leave it out"
        )
    return World(rank, local_rank, size, local_size, _device(launch.resolved().device, local_rank))


def _refuse_mpirun() -> None:
    """Raise UserError if this is one of several processes of a launcher that is not known here."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if (count := _number(name, "1", least=1)) > 1:
            raise UserError(
                f"mpirun has started {count} processes ({name}), each of which would train alone: "
                f"start one per node, with --nproc-per-node, or use torchrun or srun"
            )


def _port_of_step() -> int:
    """Return the port where the processes of a SLURM step meet.

    Steps that run at once on a node, of one job or of two, have different ones, all below those
    that the system gives to connections (from 32768).
    """
    return 20000 + (_number("SLURM_JOB_ID") + 997 * _number("SLURM_STEP_ID")) % 12000


def master() -> tuple[str, int]:
    """Return host and port where the processes meet. Raises UserError naming the variable."""
    return _variable("MASTER_ADDR"), _number("MASTER_PORT", least=1, most=65535)


def step_of_job() -> str:
    """Name the SLURM step that has started this process; "" for another launcher."""
    if "RANK" in os.environ or "SLURM_STEP_ID" not in os.environ:
        return ""
    return f"job {_number('SLURM_JOB_ID')}, step {_number('SLURM_STEP_ID')}"


def agent_has_store() -> bool:
    """Tell whether torch's agent, not rank 0, hosts the store where the processes meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _variable(name: str, default: str | None = None) -> str:
    text = os.environ.get(name, default)
    if not text:
        raise UserError(f"environment variable {name} is missing: torchrun and srun set all theirs")
    return text


def _number(name: str, default: str | None = None, least: int = 0, most: int | None = None) -> int:
    text = _variable(name, default)
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        rule = f"a whole number {limits}, as torchrun and srun set it"
        raise UserError(f"environment variable {name} must be {rule}, not {text!r}")
    return int(text)


def _index(name: str, of: str, size: int, default: str | None = None) -> int:
    """Read the variable `name`, an index of the `size` processes that the variable `of` counts."""
    index = _number(name, default)
    if index >= size:
        raise UserError(
            f"environment variable {name} is {index}, but {of} is {size}: "
            f"it goes from 0 to {size - 1}, as torchrun and srun set it"
        )
    return index


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


def another_speaks() -> bool:
    """Tell whether another process of our own launcher speaks to the user for this one."""
    return started_by_us() and os.environ["RANK"] != "0"


def restarted() -> bool:
    """Tell whether torch's elastic agent has restarted this process."""
    return _number("TORCHELASTIC_RESTART_COUNT", "0") > 0


def new_run_id() -> str:
    """Name a run, by the time and at random."""
    return f"{time.strftime(TIME_FORMAT)}-{secrets.token_hex(4)}"


def run_id() -> str | None:
    """Return what our launchers call the run; None in a process that they have not started."""
    return os.environ.get(RUN) if started_by_us() else None


def run_time() -> str:
    """Return when the run began, the same in all processes of our launchers, else the time now."""
    name = run_id()
    return time.strftime(TIME_FORMAT) if name is None else name.rpartition("-")[0]


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
