"""Real nodes on one machine, each in a network namespace, by the plain command on every host."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastimagenet import evaluate
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from tests.commands import ROOT, SMALL, summary_of
from tests.faults.hosts import Hosts, hosts, permitted
from tests.forked import Forked
from tests.test_faults import check_equal, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not permitted(), reason="network namespaces are not permitted here"),
]


SOON: dict[str, object] = {"fastimagenet.distributed.launch.LAST_CALL_SECONDS": 2}
"""Shorter waits for more nodes, each time that the nodes meet anew."""


@pytest.fixture
def three() -> Iterator[Hosts]:
    with hosts(3) as network:
        yield network


def begin(
    network: Hosts, index: int, data: Path, output: Path, nodes: str, *more: object
) -> Forked:
    endpoint = f"{network.address(0)}:29400"
    flags = ("--nodes", nodes, "--rdzv-endpoint", endpoint, "--checkpoint-steps", 3)
    data_flags = ("--data", data, "--output", output, *SMALL)
    words = ("fastimagenet.train", *data_flags, *flags, *more)
    return Forked(*words, cwd=ROOT, network=network.names[index], patches=SOON)


def end(node: Forked, status: int = 0) -> str:
    out, err = node.communicate(timeout=300)
    assert node.returncode == status, f"status {node.returncode}\n{out}\n{err}"
    return out + err


def test_two_nodes_do_what_two_processes_do_though_a_link_is_cut(
    three: Hosts,
    undisturbed: Path,
    cifar10: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one process evaluates the checkpoint to the figures that the nodes have found."""
    folder = tmp_path / "run"
    nodes = [begin(three, i, cifar10, folder, "2", "--timeout", 5) for i in range(2)]
    wait_for((folder / "checkpoints" / "last.pt").exists, nodes[0])
    three.link(1, "down")
    time.sleep(8)
    three.link(1, "up")
    said = [end(node) for node in nodes]
    assert any(": no word from rank " in text for text in said)
    check_equal(folder, undisturbed)
    last = folder / "checkpoints" / "last.pt"
    flags = ("--data", cifar10, "--device", "cpu", "--json", "--tta", "flip+crop")
    evaluate.main([str(word) for word in (last, *flags)])
    alone = json.loads(capsys.readouterr().out)
    assert alone["images"] == 200
    for name in ("top1", "top5", "tta_top1"):
        assert alone[name] == summary_of(folder)[name], name


def test_an_elastic_run_takes_a_host_in_and_lets_it_go(
    three: Hosts, cifar10: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    more = ("--epochs", 4000, "--timeout", 20, "--backend", "synthetic")
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
