"""Start the processes of this node under torch's elastic agent, and restart them when one dies."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

from torch.distributed import Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousBackend,
    create_handler,
)

from fastimagenet.distributed.meeting import RUN_KEY, listens, within
from fastimagenet.distributed.world import (
    LAUNCHER,
    RUN,
    STARTED,
    STOPPED,
    TRAINED,
    Launch,
    new_run_id,
)
from fastimagenet.errors import NotWritten
from pipelines.errors import UserError
from pipelines.signals import STOP_SIGNALS
from pipelines.workers import num_cores

RENDEZVOUS_TIMEOUT_SECONDS = 300
"""How long the launchers wait for each other."""
LAST_CALL_SECONDS = 10
"""How long an elastic run that could start waits for more nodes."""
SHUTDOWN_TIMEOUT_SECONDS = 600
"""Time to save after SIGTERM: a process may be in the middle of an evaluation."""
STOP_TIMEOUT_SECONDS = 30
"""Time to end before a restart, in which nothing is saved."""
HEARD = tuple(number.name for number in STOP_SIGNALS)
"""Signals at which the processes are asked to save and stop."""
FINAL = (2, 141, *STOPPED)
"""Exit statuses after which another start would not help: the user's mistake, a reader of the
output that has left, and a stop."""
SIOCGIFADDR = 0x8915
"""ioctl for an interface's address, from <linux/sockios.h>."""


def run_processes(
    launch: Launch, module: str, argv: list[str], seconds_before: float = 0.0, name: str = ""
) -> int:
    """Start `python -m module argv` in every process of this node and wait for the run's end.

    `seconds_before`: seconds since the command was typed, which count as the run's. `name`: what
    tells this run from others, the same on every node.
    Returns the exit status of the first process that failed, otherwise 0. Raises UserError or
    NotWritten where a process did, and UserError where the other nodes cannot be met.
    """
    if launch.nodes > 1 and not launch.rdzv_endpoint:
        raise UserError(
            f"--nodes {launch.nodes} needs --rdzv-endpoint HOST:PORT, the same on every node "
            "(or start it under torchrun or srun)"
        )
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // launch.processes)))
    # The same packages as here, whatever the working directory has.
    ours = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([ours, *filter(None, [before.get("PYTHONPATH")])])
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ[STARTED] = str(time.time() - seconds_before)
    # A new store at each restart: a shared one would still hold the dead processes' addresses.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        with heard_signals(), error_folder() as folder:
            return run_agent(launch, module, argv, name, folder)
    finally:  # what this process starts later does not belong to this run
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def heard_signals() -> Iterator[None]:
    """Have torch's agent hear the stop signals but those that are ignored, as under nohup.

    Restores the handlers that it replaces.
    """
    heard = {name: signal.getsignal(getattr(signal, name)) for name in HEARD}
    heard = {name: handler for name, handler in heard.items() if handler != signal.SIG_IGN}
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(heard)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for name, handler in heard.items():
                if handler is not None:  # None: not Python's
                    signal.signal(getattr(signal, name), handler)


def ignore_signals() -> None:
    """Ignore further stop signals: the processes are saving."""
    if threading.current_thread() is threading.main_thread():
        for name in HEARD:
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def error_folder() -> Iterator[str]:
    """Make a temporary folder where the processes leave their errors. Raises UserError."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="fastimagenet-")
    except OSError as error:
        raise UserError(
            f"no folder for temporary files can be written to ({error}): set TMPDIR"
        ) from None
    with folder as path:
        yield path


def run_agent(launch: Launch, module: str, argv: list[str], name: str, folder: str) -> int:
    """Meet the other nodes and run the agent of this one; otherwise as `run_processes`."""
    for logger in logging.root.manager.loggerDict:  # each has a level of its own
        if logger.startswith("torch.distributed.elastic"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
    agent: Agent | None = None
    try:
        meeting = rendezvous(launch)
        handler = joined(launch, meeting, name)
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
        agent = Agent(spec, DefaultLogsSpecs(log_dir=folder))
        agent.elastic = launch.min_nodes > 0
        result = agent.run()
        handler.shutdown()
    except SignalException as error:
        status = 0 if agent is None else agent.last_status()
        return 128 + int(error.sigval) if status in (0, *STOPPED) else status
    except RendezvousClosedError:
        raise UserError("the run has ended on another node, which says why") from None
    except RendezvousError as error:
        if agent is not None and agent.started:  # the node that hosts the store ended first
            agent.last_status()
            raise UserError("the run has ended on another node, which says why") from None
        raise not_met(launch, error) from None
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


def joined(launch: Launch, meeting: RendezvousParameters, name: str) -> RendezvousHandler:
    """Reach the place where the nodes meet, and agree with the others what the run is called.

    Raises UserError where what listens there does not answer within the timeout, or is not this
    run, and where no node comes.
    """
    endpoint = f"--rdzv-endpoint {launch.rdzv_endpoint}"
    until = time.monotonic() + RENDEZVOUS_TIMEOUT_SECONDS

    def reached() -> tuple[RendezvousBackend, Store, str]:
        backend, store = create_backend(meeting)
        first = store.compare_set(RUN_KEY, "", f"{name}\n{new_run_id()}")
        return backend, store, first.decode()

    while True:
        try:
            backend, store, agreed = within(launch.timeout_seconds, reached)
            break
        except (TimeoutError, RuntimeError, RendezvousConnectionError) as error:
            host, _, port = meeting.endpoint.rpartition(":")
            if "EADDRINUSE" in str(error.__cause__) or listens(host.strip("[]"), int(port)):
                raise UserError(
                    f"{endpoint}: port {port} is in use: what answers there is no run of "
                    "fastimagenet: name another port, the same on every node"
                ) from None
            hosts = launch.nodes == 1 or meeting.get_as_bool("is_host")
            if hosts or time.monotonic() > until:  # no node has come that hosts the store
                raise not_met(launch, error.__cause__ or "nobody listens there") from None
            time.sleep(0.1)
    other, _, run = agreed.partition("\n")
    if other != name:
        raise UserError(
            f"{endpoint}: another run meets there, {other}, and this is {name}: type the same "
            "command on every node, or name another port"
        )
    os.environ[RUN] = run
    return create_handler(store, backend, meeting)


def not_met(launch: Launch, reason: object) -> UserError:
    """Return the error of nodes that have not met."""
    return UserError(
        f"--rdzv-endpoint {launch.rdzv_endpoint}: the {launch.nodes} nodes did not meet within "
        f"{RENDEZVOUS_TIMEOUT_SECONDS} s ({reason}); type the same command on every node"
    )


class Agent(LocalElasticAgent):
    """An elastic agent that says why it restarts, and restarts only where that can help."""

    elastic = False
    """Whether the run continues when nodes leave."""
    told = ""
    """The error that was printed last."""

    @property
    def started(self) -> bool:
        """Whether the nodes have met and processes were started."""
        return self._pcontext is not None

    def last_status(self) -> int:
        """Return the status of the processes, which have ended, or raise what one has reported."""
        return status_of(super()._monitor_workers(self._worker_group)) if self.started else 0

    # torch 2.11 has no argument for the time, and the default of later versions is shorter.
    # SIGTERM whatever was heard: it is what all processes of a rank know.
    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0) -> None:
        ignore_signals()
        self._close(signal.SIGTERM, SHUTDOWN_TIMEOUT_SECONDS)
        super()._shutdown(signal.SIGTERM)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._close(signal.SIGTERM, STOP_TIMEOUT_SECONDS)

    def _close(self, death_sig: signal.Signals, seconds: int) -> None:
        """End the processes, with SIGKILL those that still run after `seconds`."""
        if self._pcontext is not None:
            self._pcontext.close(death_sig, seconds)

    # The agent calls this several times a second.
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        failures = sorted(result.failures.values(), key=lambda failure: failure.timestamp)
        if self.elastic and failures and all(f.exitcode in STOPPED for f in failures):
            self._remaining_restarts += 1  # a node leaves: not a fault
        elif failures:
            known, self.told = self.told, next(filter(None, map(defect_of, failures)), "")
            if self.told and self.told != known:
                print(self.told, file=sys.stderr, flush=True)  # noqa: T201
            if any(f.exitcode in FINAL or said_by(f) for f in failures) or (
                self.told and (self.told == known or TRAINED not in self.told)
            ):
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                self._tell_restart(worker_group, failures[0])
        return result

    def _tell_restart(self, worker_group: WorkerGroup, first: ProcessFailure) -> None:
        maximum = worker_group.spec.max_restarts
        rank = worker_group.workers[first.local_rank].global_rank
        restart = maximum - self._remaining_restarts + 1
        text = f"note: rank {rank} {cause(first)}; restart {restart} of {maximum}"
        print(f"{text}, from the last checkpoint", file=sys.stderr, flush=True)  # noqa: T201


def report_of(failure: ProcessFailure) -> tuple[str, str, str]:
    """Return what the process left with `report_to_launcher`: class, text and traceback."""
    message = failure.error_file_data["message"]
    if not isinstance(message, dict):
        return "", "", ""  # it died otherwise
    name, _, text = str(message["message"]).partition(": ")
    return name, text, str(message["extraInfo"]["py_callstack"]).rstrip()


def said_by(failure: ProcessFailure) -> str:
    """Return the line for the user that the process left; "" if it died otherwise."""
    name, text, _ = report_of(failure)
    return text if name in (UserError.__name__, NotWritten.__name__) else ""


def defect_of(failure: ProcessFailure) -> str:
    """Return the traceback of any other exception that has ended the process, or ""."""
    return "" if said_by(failure) else report_of(failure)[2]


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
