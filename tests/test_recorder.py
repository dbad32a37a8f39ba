"""The stopwatch and the rows on disk."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fastimagenet.recipes import named_recipe
from fastimagenet.training.clock import Stopwatch, train_seconds
from fastimagenet.training.recorder import EpochRecord, Recorder, StepRecord, best_record, read_rows
from tests.conftest import fill


def step_record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=step // 10,
        time_seconds=float(step),
        lr=0.1,
        momentum=0.9,
        loss=loss,
        images_per_sec=5.0,
    )


def epoch_record(step: int) -> EpochRecord:
    return EpochRecord(
        step=step,
        epoch=step // 10 - 1,
        time_seconds=float(step),
        train_seconds=step - 1.0,
        eval_seconds=1.0,
        data_wait_seconds=0.5,
        image_size=16,
        batch_size=8,
        images_per_sec=100.0,
        train_loss=0.5,
        top1=0.25,
        top5=0.75,
        tta_top1=0.3,
    )


@pytest.mark.parametrize(
    ("target", "top1", "top5", "val_loss", "best"),
    [
        ("", (0.3, 0.6, 0.5), (1.0, 1.0, 1.0), (2, 1, 1), 1),
        ("top1=0.9", (0.3, 0.6, 0.6), (1.0, 1.0, 1.0), (2, 1, 0.9), 2),
        ("top5=0.9", (0.3, 0.6, 0.5), (0.8, 0.9, 0.9), (2, 1, 0.9), 2),
        ("", (0.6, 0.6, 0.6), (None, None, None), (math.nan, 1, 1), 1),
        ("", (None, 0.2, None), (None, None, None), (None, 1, None), 1),
    ],
)
def test_the_best_epoch(
    target: str, top1: Sequence[float], top5: Sequence[float], val_loss: Sequence[float], best: int
) -> None:
    recipe = replace(named_recipe("digits"), target=target)
    records = [
        replace(epoch_record(10), epoch=epoch, top1=one, top5=five, val_loss=loss)
        for epoch, (one, five, loss) in enumerate(zip(top1, top5, val_loss, strict=True))
    ]
    assert best_record(records, recipe) is records[best]


def test_sections_add_up_to_the_wall_time() -> None:
    before = time.perf_counter()
    clock = Stopwatch()
    after = time.perf_counter()
    clock.switch("compute")
    for _ in clock.waiting(range(3), "data_wait", lambda: False):
        with clock.section("evaluation"), clock.section("checkpoint"):
            time.sleep(0.01)
    clock.carry_over({"compute": 1.0})
    clock.move("compute", "communication", 0.25)
    clock.carry_over({"compute": -1.0})
    shortest = time.perf_counter() - after
    seconds = clock.read()
    longest = time.perf_counter() - before
    assert shortest <= sum(seconds.values()) + 1e-9
    assert sum(seconds.values()) <= longest + 1e-9
    assert seconds["checkpoint"] >= 0.03
    assert seconds["communication"] == 0.25
    outside = seconds["evaluation"] + seconds["checkpoint"] + seconds["compile"]
    assert train_seconds(seconds) == pytest.approx(sum(seconds.values()) - outside)


def test_a_batch_that_a_busy_device_did_not_wait_for_is_no_wait() -> None:
    """Of five, the first and the last come while it is idle: each counts as a whole or not."""
    clock = Stopwatch()
    clock.switch("compute")
    busy, waits = iter([False, True, True, True, False]), []

    def slow() -> Iterator[int]:
        for number in range(5):
            time.sleep(0.002)
            yield number

    for _ in clock.waiting(slow(), "data_wait", lambda: next(busy)):
        waits.append(clock.seconds["data_wait"])
    assert waits[0] >= 0.002 and waits[1:4] == pytest.approx(3 * [waits[0]])
    assert waits[4] > waits[3] + 0.0019
    assert clock.read()["compute"] > 0.0059


def test_what_was_lost_since_a_checkpoint_counts_once() -> None:
    clock = Stopwatch(before=5.0)
    assert 5 <= clock.read()["start_up"] < 6
    clock.carry_over({"start_up": 2.0, "compute": 3.0}, lost=4.0)
    seconds = clock.read()
    assert (seconds["compute"], seconds["other"]) == (3.0, 4.0)
    assert 2 <= seconds["start_up"] < 3


def test_an_exception_leaves_the_section() -> None:
    clock = Stopwatch()
    with pytest.raises(RuntimeError), clock.section("evaluation"):
        raise RuntimeError
    before = clock.read()["evaluation"]
    time.sleep(0.002)
    assert clock.read()["evaluation"] == before


def test_rows_go_to_the_file_as_they_come_and_plain_lines_without_a_terminal(
    tmp_path: Path,
) -> None:
    stream = io.StringIO()
    recorder = Recorder(tmp_path, 20, stream)
    recorder.start(0, [])
    recorder.step(step_record(10, math.nan))
    recorder.epoch(epoch_record(10))
    recorder.event(step=10, epoch=0, time_seconds=1.0, message="resumed")
    rows = read_rows(tmp_path)
    recorder.close()
    assert [row["kind"] for row in rows] == ["step", "epoch", "event"]
    assert rows[0]["loss"] is None
    assert rows[1]["top1"] == 0.25
    text = stream.getvalue()
    assert "\r" not in text
    assert "top-1 25.00%  top-5 75.00%  with TTA 30.00%" in text


def test_resuming_drops_the_rows_that_come_again(tmp_path: Path) -> None:
    first = Recorder(tmp_path, 40, io.StringIO())
    first.start(0, [])
    for step in (10, 20, 30):
        first.step(step_record(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "torn')
    second = Recorder(tmp_path, 40, io.StringIO())
    second.start(20, [])
    second.step(step_record(30))
    second.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [10, 20, 30]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_the_rows_of_earlier_epochs_stay_whoever_counted_their_steps(tmp_path: Path) -> None:
    """One process made two epochs in 20 updates; of four each takes 2, and is stopped twice."""
    records = [epoch_record(10), epoch_record(20)]
    first = Recorder(tmp_path, 40, io.StringIO())
    first.start(0, [])
    for record in records:
        first.step(replace(step_record(record.step), epoch=record.epoch))
        first.epoch(record)
    first.step(step_record(30))
    first.close()
    four = Recorder(tmp_path, 8, io.StringIO())
    four.start(4, records, 4)
    four.step(replace(step_record(5), epoch=2))
    four.step(replace(step_record(6), epoch=2))
    four.epoch(replace(epoch_record(6), epoch=2))  # killed before its checkpoint was there
    four.close()
    again = Recorder(tmp_path, 8, io.StringIO())
    again.start(6, records, 4)
    again.close()
    found = [(row["kind"], row["epoch"], row["step"]) for row in read_rows(tmp_path)]
    assert found == [
        *(("step", 0, 10), ("epoch", 0, 10), ("step", 1, 20), ("epoch", 1, 20)),
        *(("step", 2, 5), ("step", 2, 6)),
    ]
    alone = Recorder(tmp_path, 40, io.StringIO())
    alone.start(20, records, 20)  # from the end of the second epoch, as one process counts it
    alone.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [10, 10, 20, 20]


def test_rows_that_a_full_disk_does_not_take_are_written_later(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(small_disk, 1000, io.StringIO())
    recorder.start(0, [])
    fill(small_disk)
    for step in range(500):  # more than the page that is left of the file
        recorder.step(step_record(step))
    assert "rows of metrics.jsonl (No space left on device)" in str(recorder.unwritten)
    said = capsys.readouterr().err
    assert said.count("warning: rows of metrics.jsonl could not be written") == 1
    (small_disk / "filler").unlink()
    recorder.step(step_record(500))
    assert str(recorder.unwritten) == ""
    recorder.close()
    assert [row["step"] for row in read_rows(small_disk)] == list(range(501))


def test_a_run_resumed_in_a_new_folder_has_its_earlier_epochs(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 40, io.StringIO())
    recorder.start(20, [epoch_record(10), epoch_record(20)])
    recorder.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [10, 20]


def test_a_terminal_gets_a_bar_with_rate_and_loss(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    recorder = Recorder(tmp_path, 20, stream)
    recorder.start(0, [])
    recorder.step(step_record(10, 1.25))
    recorder.close()
    assert "10/20" in stream.getvalue()
    assert "loss 1.250, 5 images/s" in stream.getvalue()
