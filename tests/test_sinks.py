"""What train --log hands to other tools, read back by their own readers."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastimagenet.report.run import rows_of
from fastimagenet.sinks import NAMES, PACKAGES, Sinks
from fastimagenet.training.recorder import read_rows
from tests.commands import SMALL, error_of, train

Points = dict[str, list[tuple[int, float]]]


def expected(folder: Path) -> Points:
    """Every figure of metrics.jsonl that has a name."""
    found: Points = {}
    for kind, names in NAMES.items():
        for row in rows_of(kind, read_rows(folder)):
            for field, name in names.items():
                if row.get(field) is not None:
                    found.setdefault(name, []).append((row["step"], float(row[field])))
    return found


def table(folder: Path) -> Points:
    found: Points = {}
    with (folder / "log.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return found


def tensorboard(folder: Path) -> Points:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def mlflow(folder: Path) -> Points:
    client = pytest.importorskip("mlflow").MlflowClient()
    run = (folder / "mlflow-run.txt").read_text()
    return {
        name: sorted((m.step, m.value) for m in client.get_metric_history(run, name))
        for name in client.get_run(run).data.metrics
    }


def same(found: Points, wanted: Points, rel: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        values = [value for _, value in points]
        assert [value for _, value in found[name]] == pytest.approx(values, rel=rel, abs=0), name


def test_a_run_and_its_resume_are_logged_once_a_step(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second epoch: what comes after the checkpoint is dropped and logged anew."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "run"
    logs = [word for name in ("csv", "tensorboard", "mlflow") for word in ("--log", name)]
    phases = "phases=[{epochs = 3, image_size = 8, batch_size = 100}]"
    flags = ("--data", cifar10, *SMALL, "--output", folder, "--set", phases, *logs)
    train(*flags)
    checkpoints = folder / "checkpoints"
    whole = expected(folder)
    assert "val/top1" in whole and len(whole["train/loss"]) >= 3
    for read, rel in ((table, 0.0), (tensorboard, 1e-6), (mlflow, 0.0)):
        same(read(folder), whole, rel)
    # As if it had been killed after the second epoch's checkpoint: the third one comes again.
    last = checkpoints / "last.pt"
    last.unlink()
    (checkpoints / "previous.pt").replace(last)
    for name in ("summary.json", "report.html"):
        (folder / name).unlink()
    train(*flags, "--resume", "auto")
    again = expected(folder)
    assert again.keys() == whole.keys()
    fixed = {name: again[name] for name in again if name in ("train/loss", "val/top1", "train/lr")}
    for read, rel in ((table, 0.0), (tensorboard, 1e-6), (mlflow, 0.0)):
        found = read(folder)
        same({name: found[name] for name in fixed}, fixed, rel)


def histories(data: bytes) -> Iterator[Any]:
    """The items of each row in a .wandb file: records of LevelDB's log, here of one block."""
    from wandb.proto import wandb_internal_pb2

    assert data.startswith(b":W&B") and len(data) < 32768
    position = 7
    while position + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, position)
        assert kind == 1  # whole
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[position + 7 : position + 7 + length])
        if record.WhichOneof("record_type") == "history":
            yield record.history.item
        position += 7 + length


def test_wandb_offline_has_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sinks = Sinks(["wandb"], tmp_path, {"data": "digits"})
    sinks.start(0)
    sinks.row("step", {"step": 10, "loss": 0.5, "lr": 0.1})
    sinks.row("epoch", {"step": 10, "top1": 0.25, "top5": None})
    sinks.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    identity = (tmp_path / "wandb" / "run-id.txt").read_text()
    assert file.name == f"run-{identity}.wandb"
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row}
        for row in histories(file.read_bytes())
    ]
    merged: dict[str, Any] = {}
    for row in rows:
        merged |= row
    assert (merged["train/loss"], merged["val/top1"], merged["_step"]) == (0.5, 0.25, 10)
    assert wandb.run is None


def test_a_tool_that_fails_is_named_once_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sinks = Sinks(["tensorboard", "csv"], tmp_path, {})
    (tmp_path / "tensorboard").write_text("a file in its place")
    sinks.start(0)
    for step in (1, 2):
        sinks.row("step", {"step": step, "loss": 1.0})
    sinks.row("step", {"step": 3, "loss": float("nan")})
    sinks.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: --log tensorboard is left out from now on: ")
    assert table(tmp_path) == {"train/loss": [(1, 1.0), (2, 1.0)]}


def test_what_is_not_installed_or_not_known_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = [*SMALL, "--output", tmp_path / "out"]
    assert "--log: invalid choice: 'comet'" in error_of(*flags, "--log", "comet")
    monkeypatch.setitem(PACKAGES, "wandb", "no_such_module")
    assert "--log wandb: pip install no_such_module" in error_of(*flags, "--log", "wandb")
    assert not (tmp_path / "out").exists()
