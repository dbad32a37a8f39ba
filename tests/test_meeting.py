"""Where processes meet: another run, another program or nobody there is one line, in time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from torch.distributed import TCPStore

from fastimagenet.distributed.launch import run_processes
from fastimagenet.distributed.meeting import RUN_KEY, meet
from fastimagenet.distributed.world import LAUNCHER, Launch, World
from fastimagenet.errors import PeerLost
from pipelines.errors import UserError
from tests.commands import free_endpoint

RANKS = World(0, 0, 2, 2), World(1, 1, 2, 2)
IN_USE = r"port \d+ is in use: set MASTER_PORT to a free one, the same for all processes "


def meet_at(port: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    for name in ("RANK", "SLURM_STEP_ID", LAUNCHER):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["a silent server", "a web server"])
def foreign(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a program that is none of ours."""
    if request.param == "a silent server":
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server.getsockname()[1]
        return
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        web.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield web.server_port
        web.shutdown()


def test_a_port_that_another_program_has_is_named_by_every_rank(
    foreign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet_at(foreign, monkeypatch)
    for world in RANKS:
        with pytest.raises(UserError, match=IN_USE):
            meet(world, 1, "run")
    # Our launcher has found it free: another start will find another one.
    monkeypatch.setenv(LAUNCHER, "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(PeerLost, match="is in use"):
        meet(RANKS[0], 1, "run")


def test_nodes_do_not_wait_for_another_program(foreign: int) -> None:
    launch = Launch(2, 1, "cpu", f"127.0.0.1:{foreign}", timeout_seconds=1)
    message = f"--rdzv-endpoint 127.0.0.1:{foreign}: port {foreign} is in use: .* name another port"
    with pytest.raises(UserError, match=message):
        run_processes(launch, "fastimagenet.train", [])


def test_nobody_who_answers_is_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    meet_at(free_endpoint().partition(":")[2], monkeypatch)
    with pytest.raises(PeerLost, match="rank 1, in the start: rank 0 does not answer at port"):
        meet(RANKS[1], 1, "run")
    with pytest.raises(PeerLost, match="rank 0, in the start: no word from rank 1 within 3 s"):
        meet(RANKS[0], 3, "run")


def test_two_runs_that_meet_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of the first and rank 1 of the second, which find each other."""
    meet_at(free_endpoint().partition(":")[2], monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, RANKS[0], 5, "one")
        with pytest.raises(UserError, match=IN_USE + r"\(another run meets there on .*: one\)"):
            meet(RANKS[1], 5, "two")
        with pytest.raises(PeerLost, match="no word from rank 1"):
            first.result()


def test_a_rank_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name that they share is that of the step, too."""
    meet_at(free_endpoint().partition(":")[2], monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_STEP_ID", "7")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, RANKS[0], 10, "run")
        store = meet(RANKS[1], 10, "run")
        assert store.get(RUN_KEY) == first.result().get(RUN_KEY) == b"job 5, step 7, run"
        store.set("fastimagenet/rank/1", "elsewhere, process 1")
        with pytest.raises(
            UserError, match=r"another rank 1 has met there .*: elsewhere, process 1"
        ):
            meet(RANKS[1], 10, "run")


def test_nodes_of_two_runs_at_one_endpoint_do_not_mix() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set(RUN_KEY, "fastimagenet.train runs/a\n20261129-100000-0123abcd")
    launch = Launch(2, 1, "cpu", f"127.0.0.1:{store.port}", timeout_seconds=10)
    message = "another run meets there, fastimagenet.train runs/a, and this is fastimagenet.train r"
    with pytest.raises(UserError, match=message):
        run_processes(launch, "fastimagenet.train", [], name="fastimagenet.train runs/b")
