"""Start the processes of this node under torch's elastic agent, and restart them when one dies."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousParameters,
    registry,
)

from fastimagenet.distributed.world import LAUNCHER, STARTED, STOPPED, Launch
from fastimagenet.errors import NotWritten
from fastimagenet.machine import ASKED_THREADS
from pipelines.errors import UserError
from pipelines.workers import num_cores

RENDEZVOUS_TIMEOUT_SECONDS = 300
"""How long the launchers wait for each other."""
LAST_CALL_SECONDS = 10
"""How long an elastic run that could start waits for more nodes."""
SHUTDOWN_TIMEOUT_SECONDS = 600
"""Time to save after SIGTERM: a process may be in the middle of an evaluation."""
STOP_TIMEOUT_SECONDS = 30
"""Time to end before a restart, in which nothing is saved."""
SIOCGIFADDR = 0x8915
"""ioctl for an interface's address, from <linux/sockios.h>."""


def run_processes(launch: Launch, module: str, argv: list[str], seconds_before: float = 0.0) -> int:
    """Start `python -m module argv` in every process of this node and wait for the run's end.

    `seconds_before`: seconds since the command was typed, which count as the run's.
    Returns the exit status of the first process that failed, otherwise 0. Raises UserError or
    NotWritten where a process did, and UserError where the other nodes cannot be met.
    """
    if launch.nodes > 1 and not launch.rdzv_endpoint:
        raise UserError(
            f"--nodes {launch.nodes} needs --rdzv-endpoint HOST:PORT, the same on every node "
            "(or start it under torchrun or srun)"
        )
    before = dict(os.environ)
    threads = ASKED_THREADS or str(max(1, num_cores() // launch.processes))
    os.environ["OMP_NUM_THREADS"] = threads
    # The same packages as here, whatever the working directory has.
    ours = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([ours, *filter(None, [before.get("PYTHONPATH")])])
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ[STARTED] = str(time.time() - seconds_before)
    # A new store at each restart: a shared one would still hold the dead processes' addresses.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        return run_agent(launch, module, argv)
    finally:  # what this process starts later does not belong to this run
        os.environ.clear()
        os.environ.update(before)


def run_agent(launch: Launch, module: str, argv: list[str]) -> int:
    """Meet the other nodes and run the agent of this one; otherwise as `run_processes`."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    agent: Agent | None = None
    try:
        meeting = rendezvous(launch)
        handler = registry.get_rendezvous_handler(meeting)
        spec = WorkerSpec(
            role="",
            local_world_size=launch.processes,
            entrypoint=sys.executable,
            args=("-u", "-m", module, *argv),
            rdzv_handler=handler,
            max_restarts=launch.max_restarts,
            monitor_interval=0.1,
            local_addr=meeting.local_addr,
        )
        agent = Agent(spec, DefaultLogsSpecs())
        agent.elastic = launch.min_nodes > 0
        result = agent.run()
        handler.shutdown()
    except SignalException as error:
        if agent is not None:
            agent.check_saved()
        return 128 + int(error.sigval)
    except RendezvousClosedError:
        raise UserError("the run has ended on another node, which says why") from None
    except RendezvousError as error:
        if agent is not None and agent.started:  # the node that hosts the store ended first
            agent.check_saved()
            raise UserError("the run has ended on another node, which says why") from None
        raise UserError(
            f"--rdzv-endpoint {launch.rdzv_endpoint}: the {launch.nodes} nodes did not meet within "
            f"{RENDEZVOUS_TIMEOUT_SECONDS} s ({error}); type the same command on every node"
        ) from None
    return 0 if result is None else status_of(result)


def rendezvous(launch: Launch) -> RendezvousParameters:
    """Describe how the nodes meet; gloo gets the network interface on the way there."""
    address, is_host = address_towards(launch.rdzv_endpoint)
    if launch.rdzv_endpoint and (interface := interface_of(address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return RendezvousParameters(
        backend="c10d",
        endpoint=launch.rdzv_endpoint or "localhost:0",
        run_id="fastimagenet",
        min_nodes=launch.min_nodes or launch.nodes,
        max_nodes=launch.nodes,
        local_addr=address,
        # Several launchers on one machine: the first one hosts, which torch finds out by itself.
        is_host=None if ip_address(address).is_loopback else is_host,
        join_timeout=RENDEZVOUS_TIMEOUT_SECONDS,
        last_call_timeout=LAST_CALL_SECONDS,
    )


class Agent(LocalElasticAgent):
    """An elastic agent that says why it restarts, and does not restart what ended on purpose."""

    elastic = False
    """Whether the run continues when nodes leave."""

    @property
    def started(self) -> bool:
        """Whether the nodes have met and processes were started."""
        return self._pcontext is not None

    def check_saved(self) -> None:
        """Raise what one of the processes, which have ended, has reported."""
        if self.started:
            status_of(super()._monitor_workers(self._worker_group))

    # torch 2.11 has no argument for the time, and the default of later versions is shorter.
    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0) -> None:
        self._close(death_sig, SHUTDOWN_TIMEOUT_SECONDS)
        super()._shutdown(death_sig)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._close(signal.SIGTERM, STOP_TIMEOUT_SECONDS)

    def _close(self, death_sig: signal.Signals, seconds: int) -> None:
        """End the processes, with SIGKILL those that still run after `seconds`."""
        if self._pcontext is not None:
            self._pcontext.close(death_sig, seconds)

    # The agent calls this several times a second.
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        failures = list(result.failures.values())
        if self.elastic and failures and all(f.exitcode in STOPPED for f in failures):
            self._remaining_restarts += 1  # a node leaves: not a fault
        elif any(said_by(failure) or failure.exitcode in STOPPED for failure in failures):
            self._remaining_restarts = 0
        elif failures and self._remaining_restarts:
            maximum = worker_group.spec.max_restarts
            first = min(failures, key=lambda failure: failure.timestamp)
            rank = worker_group.workers[first.local_rank].global_rank
            restart = maximum - self._remaining_restarts + 1
            text = f"note: rank {rank} {cause(first)}; restart {restart} of {maximum}"
            print(f"{text}, from the last checkpoint", file=sys.stderr, flush=True)  # noqa: T201
        return result


def said_by(failure: ProcessFailure) -> str:
    """Return what the process left with `report_to_launcher`; "" if it died otherwise."""
    message = failure.error_file_data["message"]
    return str(message["message"]).partition(": ")[2] if isinstance(message, dict) else ""


def cause(failure: ProcessFailure) -> str:
    """Say how a process ended."""
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"ended with exit status {failure.exitcode}"


def address_towards(endpoint: str | None) -> tuple[str, bool]:
    """Return this node's IP address on the way to the endpoint, and whether the endpoint is here.

    Unlike the host's name, other nodes can reach it. Raises UserError naming the flag.
    """
    if endpoint is None:
        return "127.0.0.1", True
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UserError(f"--rdzv-endpoint must be HOST:PORT, PORT from 1 to 65535, not {endpoint}")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
        family, *_, target = found[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # UDP: nothing is sent
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"--rdzv-endpoint {endpoint}: {host} cannot be reached: {error}") from None
    return own, own == target[0]


def interface_of(address: str) -> str:
    """Return the name of the network interface with this IP address, "eth0"; "" for none."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        rows = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
        return next((row.split()[-1] for row in rows if row.startswith(packed)), "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def status_of(result: RunResult) -> int:
    """Return the exit status of the first process that failed, otherwise 0.

    Raises what a process has reported: the processes it took down with it die of other causes.
    """
    failures = sorted(result.failures.values(), key=lambda failure: failure.timestamp)
    for failure in failures:
        if text := said_by(failure):
            raise UserError(text) if failure.exitcode == 2 else NotWritten(text)
    if not failures:
        return 0
    code = failures[0].exitcode
    return 128 - code if code < 0 else code
