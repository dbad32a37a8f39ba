"""Real nodes on one machine, each in a network namespace, by the plain command on every host."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from tests.faults.hosts import Hosts, hosts, permitted
from tests.test_faults import check_equal, wait_for
from tests.test_train import SMALL, run, summary_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not permitted(), reason="network namespaces are not permitted here"),
]


@pytest.fixture
def three() -> Iterator[Hosts]:
    with hosts(3) as network:
        yield network


def begin(
    network: Hosts, index: int, data: Path, output: Path, nodes: str, *more: object
) -> subprocess.Popen[str]:
    endpoint = f"{network.address(0)}:29400"
    flags = ("--nodes", nodes, "--rdzv-endpoint", endpoint, "--checkpoint-steps", 3)
    data_flags = ("--data", data, "--output", output, *SMALL)
    return network.start(index, "fastimagenet.train", *data_flags, *flags, *more)


def end(node: subprocess.Popen[str], status: int = 0) -> str:
    out, err = node.communicate(timeout=300)
    assert node.returncode == status, f"status {node.returncode}\n{out}\n{err}"
    return out + err


def test_two_nodes_do_what_two_processes_of_one_do(
    three: Hosts,
    undisturbed: Path,
    cifar10: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    for node in [begin(three, index, cifar10, folder, "2") for index in range(2)]:
        end(node)
    check_equal(folder, undisturbed)
    last = folder / "checkpoints" / "last.pt"
    flags = ("--data", cifar10, "--device", "cpu", "--json", "--tta", "flip+crop")
    alone = json.loads(run("fastimagenet.evaluate", last, *flags)[0])
    assert alone["images"] == 200
    for name in ("top1", "top5", "tta_top1"):
        assert alone[name] == summary_of(folder)[name], name


def test_a_link_that_is_cut_and_restored(
    three: Hosts,
    undisturbed: Path,
    cifar10: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    nodes = [begin(three, i, cifar10, folder, "2", "--timeout", 5) for i in range(2)]
    wait_for((folder / "checkpoints" / "last.pt").exists, nodes[0])
    three.link(1, "down")
    time.sleep(8)
    three.link(1, "up")
    said = [end(node) for node in nodes]
    assert any(": no word from rank " in text for text in said)
    check_equal(folder, undisturbed)


def test_an_elastic_run_takes_a_host_in_and_lets_it_go(
    three: Hosts, cifar10: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    more = ("--epochs", 400, "--timeout", 20)
    first = begin(three, 0, cifar10, folder, "1:3", *more)
    wait_for((folder / "checkpoints" / "epoch.pt").exists, first)
    second = begin(three, 1, cifar10, folder, "1:3", *more)

    def resumed(processes: str) -> bool:
        events = rows_of("event", read_rows(folder))
        return any(f"resumed, processes {processes}" in row["message"] for row in events)

    def epochs_done() -> int:
        return len(rows_of("epoch", read_rows(folder)))

    wait_for(lambda: resumed("1 -> 2"), first)
    before = epochs_done()
    wait_for(lambda: epochs_done() > before, first)
    second.terminate()
    end(second, 143)
    wait_for(lambda: resumed("2 -> 1"), first)
    before = epochs_done()
    wait_for(lambda: epochs_done() > before, first)
    first.terminate()
    end(first, 143)
    epochs = [row["epoch"] for row in rows_of("epoch", read_rows(folder))]
    assert epochs == list(range(len(epochs)))
