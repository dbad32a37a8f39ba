"""Checkpoints written beside the training: what they hold, their order, a disk without space."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastimagenet.report.run import rows_of
from fastimagenet.training import checkpoint
from fastimagenet.training.checkpoint import CheckpointWriter, copied
from fastimagenet.training.recorder import NullRecorder, Recorder, read_rows


def state_at(step: int, value: torch.Tensor | None = None) -> dict[str, Any]:
    weight = torch.full((4,), float(step)) if value is None else value
    return {"step": step, "epoch": 0, "clock": {"compute": 1.5}, "model": {"weight": weight}}


def test_a_copy_is_the_state_and_stays_it_when_the_training_goes_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": None}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = copied(state)
    assert type(copy["model"]) is type(state["model"])
    assert copy["model"]._metadata == state["model"]._metadata
    assert (copy["optimizer"], copy["ema"]) == (optimizer.state_dict(), None)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    for name, value in before.items():
        assert torch.equal(copy["model"][name], value), name
        assert copy["model"][name].stride() == value.stride()


def test_the_training_waits_for_the_checkpoint_before_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is held up; what the weights become meanwhile is not in the file."""
    free, save_last = threading.Event(), checkpoint.save_last

    def held_up(*arguments: Any) -> None:
        assert free.wait(60)
        save_last(*arguments)

    monkeypatch.setattr(checkpoint, "save_last", held_up)
    writer, weight = CheckpointWriter(tmp_path, NullRecorder()), torch.zeros(4)
    writer.save(state_at(1, weight))
    weight.fill_(7)
    assert not any(tmp_path.iterdir())
    second = threading.Thread(target=writer.save, args=(state_at(2), [checkpoint.BEST]))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    free.set()
    second.join()
    assert writer.finish() and writer.finish()
    steps = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last.pt": 2, "previous.pt": 1, "best.pt": 2}
    assert checkpoint.load(tmp_path / "previous.pt")["model"]["weight"].sum() == 0


def test_what_the_disk_does_not_take_is_told_and_the_earlier_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path, 10)
    recorder.start(0, [])
    writer = CheckpointWriter(tmp_path / "checkpoints", recorder)
    writer.save(state_at(1))
    assert writer.finish()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        writer.save(state_at(2))
        assert not writer.finish()
    writer.save(state_at(3))
    assert writer.finish()
    recorder.close()
    (event,) = rows_of("event", read_rows(tmp_path))
    assert (event["step"], event["message"]) == (2, "checkpoint not written at step 2")
    assert event["time_seconds"] == 1.5
    assert "warning: checkpoint of step 2 could not be written: No space" in capsys.readouterr().err
    assert "checkpoint of step 2 (No space left on device)" in str(recorder.unwritten)
    folder = tmp_path / "checkpoints"
    assert [checkpoint.load(folder / n)["step"] for n in ("last.pt", "previous.pt")] == [3, 1]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    checkpoint.save_last(tmp_path, state_at(1))
    for name in (".last.pt.new", "..last.pt.new.77", ".previous.pt.77"):
        (tmp_path / name).write_bytes(b"half")
    CheckpointWriter(tmp_path, NullRecorder())
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_defect_in_the_thread_is_no_silent_loss(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, NullRecorder())
    writer.save(state_at(1) | {"model": (item for item in ())})
    with pytest.raises(TypeError, match="cannot pickle"):
        writer.finish()
