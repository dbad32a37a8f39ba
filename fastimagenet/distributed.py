"""Processes: who we are (`World`), how they are started (`launch`), what they exchange.

The only reader of RANK, WORLD_SIZE and SLURM_*. torch's elastic agent does the launching.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.workers import num_cores

if TYPE_CHECKING:
    from torch import Tensor

RENDEZVOUS_TIMEOUT_SECONDS = 300
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
SHUTDOWN_TIMEOUT_SECONDS = 600
"""Time to save in after SIGTERM: a process may be in the middle of an evaluation."""
REPORT_TO_LAUNCHER = "FASTIMAGENET_REPORT_TO_LAUNCHER"


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
    nodes: int, nproc_per_node: int | None, device: str, endpoint: str | None
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
    return Launch(nodes, processes, device, endpoint)


def launched_world(launch: Launch) -> World | None:
    """The World that torchrun, srun or our own launcher has put this process in; None before that.

    Raises UserError where what was launched differs from what the flags say.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", "0"))
        local_size = int(env.get("LOCAL_WORLD_SIZE", "1"))
        nodes = int(env.get("GROUP_WORLD_SIZE", str(launch.nodes)))
        starter = f"torchrun --nnodes {launch.nodes}"
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        local_rank = int(env["SLURM_LOCALID"])
        nodes = int(env["SLURM_NNODES"])
        local_size = size // nodes
        starter = f"srun --nodes {launch.nodes}"
        env.setdefault("MASTER_ADDR", _first_host(env["SLURM_JOB_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    else:
        return None
    if nodes != launch.nodes:
        raise UserError(
            f"--nodes {launch.nodes}, but {nodes} node(s) were launched: "
            f"start it with {starter} or say --nodes {nodes}"
        )
    return World(rank, local_rank, size, local_size, _device(launch.device, local_rank))


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
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", node_list)
    assert match is not None
    return match.group(1) + (match.group(2) or "")


def started_by_us() -> bool:
    """Whether our own launcher, which has checked flags and data, started this process."""
    return REPORT_TO_LAUNCHER in os.environ and "RANK" in os.environ


def report_to_launcher(error: Exception) -> bool:
    """Leave the error to our launcher, which says it once; False where there is none."""
    if not started_by_us():
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return True


def run_processes(launch: Launch, module: str, argv: list[str]) -> int:
    """Start `python -m module argv` in every process of this node and wait for the run's end.

    Returns the exit status: that of the first process that failed, otherwise 0.
    Raises UserError where a process did, or where the other nodes cannot be met.
    """
    if launch.nodes > 1 and not launch.rdzv_endpoint:
        raise UserError(
            f"--nodes {launch.nodes} needs --rdzv-endpoint HOST:PORT, the same on every node "
            "(or start it under torchrun or srun)"
        )
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // launch.nproc_per_node)))
    os.environ[REPORT_TO_LAUNCHER] = "1"
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=launch.nodes,
        max_nodes=launch.nodes,
        nproc_per_node=launch.nproc_per_node,
        run_id="fastimagenet",
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rdzv_endpoint or "localhost:0",
        rdzv_configs={"join_timeout": RENDEZVOUS_TIMEOUT_SECONDS},
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *argv)
    except ChildFailedError as error:
        for failure in error.failures.values():
            # The user's mistake wins: processes that it took down with it die of other causes.
            if failure.exitcode == 2:
                said: Any = failure.message
                text = said["message"] if isinstance(said, dict) else said
                raise UserError(text.removeprefix("UserError: ")) from None
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        raise UserError(
            f"--rdzv-endpoint {launch.rdzv_endpoint}: the {launch.nodes} nodes did not meet within "
            f"{RENDEZVOUS_TIMEOUT_SECONDS} s ({error}); type the same command on every node"
        ) from None
    return 0


@contextmanager
def process_group(world: World) -> Iterator[None]:
    """Join the other processes, leave them at the end; nothing to do where there are none."""
    import torch

    if world.device != "cpu":
        torch.cuda.set_device(world.device)
    if world.world_size == 1:
        yield
        return
    backend = "gloo" if world.device == "cpu" else "nccl"
    torch.distributed.init_process_group(
        backend, rank=world.rank, world_size=world.world_size, timeout=COLLECTIVE_TIMEOUT
    )
    yield
    # Not after an error: NCCL's teardown waits for all, and the others wait in a collective.
    torch.distributed.destroy_process_group()


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """The sum over all processes, on each of them; `tensor` itself is overwritten."""
    if world.world_size > 1:
        import torch

        torch.distributed.all_reduce(tensor)
    return tensor


def broadcast(tensors: Iterable[Tensor], world: World) -> None:
    """Give every process the values that the first one has."""
    if world.world_size > 1:
        import torch

        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def any_process(flag: bool, world: World) -> bool:
    """Whether the flag is set on any process; every process has to ask."""
    if world.world_size == 1:
        return flag
    import torch

    return bool(all_reduce_sum(torch.tensor(int(flag), device=world.device), world).item())


def gather_objects(value: Any, world: World) -> list[Any]:
    """The plain values of all processes by rank, on each of them."""
    if world.world_size == 1:
        return [value]
    import torch

    values: list[Any] = [None] * world.world_size
    torch.distributed.all_gather_object(values, value)
    return values
