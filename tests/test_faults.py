"""What clusters do to a run of several processes, which are real ones: killed, stopped, left alone.

Each run has to end with the weights and figures of one that nothing has disturbed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastimagenet.report.run import rows_of
from fastimagenet.training import checkpoint
from fastimagenet.training.recorder import read_rows
from tests.commands import SMALL, TWO, free_endpoint, losses_of, start
from tests.conftest import fill
from tests.forked import RANK_NAME, Forked

pytestmark = pytest.mark.slow


def wait_for(condition: Callable[[], object], process: Forked) -> None:
    """Until it holds; fails when the process has ended before, or after five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def ranked_workers(agent: Forked) -> dict[int, int]:
    """The processes that a launcher has started, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        name = Path(f"/proc/{child}/comm").read_text()
        if name.startswith(RANK_NAME):
            ranks[int(name.removeprefix(RANK_NAME))] = child
    return ranks


def workers(agent: Forked) -> list[int]:
    """The processes that a launcher has started, in the order of their ranks."""
    return [process for _, process in sorted(ranked_workers(agent).items())]


def check_equal(folder: Path, undisturbed: Path) -> None:
    """The same weights, losses and figures, bit for bit."""
    ends = [checkpoint.load(f / "checkpoints" / "last.pt") for f in (folder, undisturbed)]
    for name, value in ends[1]["model"].items():
        assert torch.equal(ends[0]["model"][name], value), name
    assert losses_of(folder) == losses_of(undisturbed)
    figures = [
        [(row["epoch"], row["train_loss"], row["top1"]) for row in rows_of("epoch", read_rows(f))]
        for f in (folder, undisturbed)
    ]
    assert figures[0] == figures[1]


def test_a_killed_worker_is_started_again_from_the_last_checkpoint(
    undisturbed: Path, cifar10: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start("fastimagenet.train", "--data", cifar10, "--output", folder, *TWO)
    wait_for((folder / "checkpoints" / "last.pt").exists, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "note: rank 1 was killed by SIGKILL; restart 1 of 3, from the last checkpoint" in err
    assert all(line.startswith(("note: ", "error: ")) for line in err.splitlines()), err
    assert "resumed at step " in out
    check_equal(folder, undisturbed)


NOISE = ("--backend", "synthetic", "--epochs", 60)
"""Where it matters only that there is a training: it starts without DALI, and does not end soon."""


def test_a_straggler_is_named_within_the_timeout(cifar10: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ("--data", cifar10, "--output", folder, *TWO, *NOISE)
    process = start("fastimagenet.train", *flags, "--timeout", 10, "--max-restarts", 0)
    wait_for((folder / "checkpoints" / "last.pt").exists, process)
    waiting, straggler = workers(process)
    os.kill(straggler, signal.SIGSTOP)
    line = process.stderr.readline()
    # The launcher ends a straggler that does not react after minutes; not to wait for that, it is
    # killed here, but only when the launcher has seen that the other one failed first.
    while Path(f"/proc/{waiting}").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(straggler, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, line + err
    assert line.startswith("error: rank 0, in ") and ": no word from rank 1 (" in line
    assert "Traceback" not in err


def test_no_process_outlives_its_launcher(cifar10: Path, tmp_path: Path) -> None:
    """Otherwise it would write into the folder of the run that is resumed."""
    folder = tmp_path / "run"
    process = start("fastimagenet.train", "--data", cifar10, "--output", folder, *TWO, *NOISE)
    wait_for((folder / "checkpoints" / "last.pt").exists, process)
    orphans = workers(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{orphan}/cmdline").exists() for orphan in orphans):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stop_that_no_disk_takes_is_told_on_every_node(cifar10: Path, small_disk: Path) -> None:
    """SIGTERM goes to the launcher of the node that does not write."""
    folder, endpoint = small_disk / "run", free_endpoint()
    flags = ("--data", cifar10, "--output", folder, *SMALL, *NOISE)
    nodes = [
        start("fastimagenet.train", *flags, "--nodes", 2, "--rdzv-endpoint", endpoint)
        for _ in range(2)
    ]
    wait_for(lambda: losses_of(folder), nodes[0])
    fill(small_disk)
    next(node for node in nodes if 1 in ranked_workers(node)).terminate()
    for node in nodes:
        out, err = node.communicate(timeout=300)
        assert node.returncode == 1, out + err
        assert "error: not written: " in err and "checkpoint of step " in err
