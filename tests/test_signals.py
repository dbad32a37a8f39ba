"""Signals that stop: heard everywhere, after what was trained is saved, and only once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from fastimagenet.report.run import rows_of
from fastimagenet.training import checkpoint, evaluation
from fastimagenet.training.recorder import read_rows
from pipelines.backends.torchvision import TorchvisionLoader
from pipelines.datasets import remote
from pipelines.datasets.split import read_split
from pipelines.loader import LoaderSpec, Stage
from pipelines.signals import STOP_SIGNALS, Interrupted, stop_signals
from pipelines.workers import kill_left_workers
from tests.commands import SMALL, losses_of, train
from tests.test_trainer import Killed, make_trainer

STEPS = 10
"""Of the first epoch of tests/small.toml, which has 8 batches to validate."""


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.fixture
def at_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], list[int]]:
    """Call a function in a batch of the evaluations, counted from 1; returns those that ran."""
    count = evaluation.count_correct

    def install(batch: int, action: Callable[[], None]) -> list[int]:
        ran: list[int] = []

        def counting(*arguments: Any) -> torch.Tensor:
            ran.append(len(ran) + 1)
            if ran[-1] == batch:
                action()
            return count(*arguments)

        monkeypatch.setattr(evaluation, "count_correct", counting)
        return ran

    return install


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_evaluation_hears_each_of_them_within_a_batch(
    number: int, at_batch: Any, cifar10: Path, tmp_path: Path
) -> None:
    ran = at_batch(3, lambda: send(number))
    out, _ = train("--data", cifar10, "--output", tmp_path, *SMALL, status=128 + number)
    assert len(ran) == 3
    assert f"stopped at step {STEPS}; resume with " in out
    state = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert (state["step"], state["epoch"]) == (STEPS, 0)


def test_a_resume_repeats_the_evaluation_only_bit_for_bit(
    at_batch: Any,
    finished: Path,
    cifar10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the last one, with TTA, by three signals and three more within the saving."""
    save = checkpoint.save_last

    def disturbed(*arguments: Any) -> None:
        if len(ran) > 16:
            send(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save_last", disturbed)
    ran = at_batch(19, lambda: send(signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1))
    flags = ("--data", cifar10, "--output", tmp_path, *SMALL)
    out, _ = train(*flags, status=128 + signal.SIGUSR1)
    assert "stopped and saved at step 40" in out
    before = losses_of(tmp_path)
    # What is ignored, as under nohup, stays ignored.
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_batch(3, lambda: send(signal.SIGHUP))
        train(*flags, "--resume", "auto")
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert losses_of(tmp_path) == before == losses_of(finished), "no update was repeated"
    ends = [checkpoint.load(f / "checkpoints" / "last.pt") for f in (tmp_path, finished)]
    for name, value in ends[1]["model"].items():
        assert torch.equal(ends[0]["model"][name], value), name
    rows, expected = (list(rows_of("epoch", read_rows(f))) for f in (tmp_path, finished))
    names = ("step", "train_loss", "val_loss", "top1", "top5", "tta_top1", "tta_top5")
    assert [[r[n] for n in names] for r in rows] == [[r[n] for n in names] for r in expected]
    assert rows[-1]["images_per_sec"] > 0, "that of the updates before the stop"


@pytest.mark.parametrize("seconds", [0, 3600])
def test_a_long_evaluation_begins_with_a_checkpoint(
    seconds: int, at_batch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the first evaluation: of a short one only the epoch's end saves."""

    def die() -> None:
        raise Killed

    monkeypatch.setattr("fastimagenet.training.trainer.SAVE_AFTER_SECONDS", seconds)
    at_batch(2, die)
    trainer = make_trainer(folder=tmp_path)
    with pytest.raises(Killed):
        trainer.fit()
    last = tmp_path / "checkpoints" / "last.pt"
    assert last.exists() == (seconds == 0)
    if last.exists():
        assert checkpoint.load(last)["step"] == trainer.step == 3


STAGES = {
    "pipelines.datasets.index.check_images": (),
    "pipelines.backends.memory.MemoryLoader.fill": ("--backend", "memory"),
    "fastimagenet.run.whiten": ("--set", "model=speednet", "--set", "whitening=true"),
    "fastimagenet.training.trainer.Trainer.compile_all_sizes": ("--set", "compile=true"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_waited_for_before_the_training(
    stage: str, cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work of these stages would go on; the folder of the run is not begun."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def interrupted(*_: Any, **__: Any) -> Any:
        send(signal.SIGHUP, signal.SIGTERM)
        threading.Event().wait(60)
        pytest.fail("it goes on")

    monkeypatch.setattr(stage, interrupted)
    if stage.endswith("check_images"):  # in threads, which are waited for: let them end
        monkeypatch.setattr(stage, lambda job: send(signal.SIGHUP) or (job[0], [], []))
    output = tmp_path / "run"
    _, err = train("--data", cifar10, "--output", output, *SMALL, *STAGES[stage], status=129)
    assert err == "interrupted by SIGHUP\n"
    assert not output.exists()
    assert bool(list((tmp_path / "cache").rglob("*.npz"))) != stage.endswith("check_images")


def test_workers_leave_signals_to_their_parent_and_end_with_it(cifar10: Path) -> None:
    """A scheduler sends them to all processes of a job; the parent still needs the batches."""
    spec = LoaderSpec(
        split=read_split(cifar10, "val"),
        stages=(Stage(epochs=1, image_size=8, batch_size=20),),
        training=False,
        num_threads=1,
    )
    with closing(TorchvisionLoader(spec)) as loader:
        batches = iter(loader)
        next(batches)
        (worker,) = multiprocessing.active_children()
        for number in STOP_SIGNALS:
            os.kill(worker.pid, number)
        assert len(list(batches)) == 9
        kill_left_workers()
        worker.join(60)
        assert worker.exitcode in (0, -signal.SIGKILL)


def test_a_copy_from_a_server_that_no_longer_answers_is_left_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "fastimagenet" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "LEAVE_SECONDS", 0.2)
    answered = threading.Event()

    def read(_: Any, name: str, max_bytes: int) -> Iterator[bytes]:
        if name == remote.NAME:
            yield b"{}"
            return
        yield b"half"
        send(signal.SIGUSR1)
        answered.wait(60)

    class Manifest:
        complete = True

    monkeypatch.setattr(remote.Store, "read", read)
    monkeypatch.setattr(remote, "parse_manifest", lambda *_: Manifest())
    monkeypatch.setattr(remote, "files_of", lambda _: [("train-00000.tar", 9, "0")])
    _, err = train("--data", "memory://bucket/shards", status=138)
    answered.set()
    assert err == "interrupted by SIGUSR1\n"
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert not list(folder.iterdir())


def test_what_an_exception_did_not_end_is_heard_before_the_training() -> None:
    """Python drops what is raised in a callback; the handlers are then as they were before."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    heard: list[str] = []
    with stop_signals() as outer:
        with pytest.raises(Interrupted, match="interrupted by SIGTERM"):
            send(signal.SIGTERM)
        with stop_signals(lambda: heard.append("asked")) as inner:
            send(signal.SIGINT)
        send(signal.SIGHUP)
    assert heard == ["asked"]
    assert outer.number == inner.number == signal.SIGTERM
    assert before == [signal.getsignal(number) for number in STOP_SIGNALS]
