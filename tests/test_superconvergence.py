"""The study as a command, rehearsed with a small network on 500 real images."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import compare
from benchmarks.common.matrix import Data
from benchmarks.superconvergence import main, run_result, table
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.superconvergence import STUDY, study_recipe
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from pipelines.errors import UserError
from pipelines.files import Row, read_object
from tests.commands import CHILDREN, call, start

SMALL = (
    *("--only", "3b", "steps", "--epochs", "2", "--precision", "fp32", "--device", "cpu"),
    *("--set", "model=smallnet", "--set", "phases.0.image_size=8", "--set", "max_lr=0.05"),
    *("--set", "phases.0.batch_size=16"),
)
"""Two runs of two epochs of 31 updates."""
MODULE = "benchmarks.superconvergence"


def curves(folder: Path) -> list[tuple[Any, ...]]:
    """What a training computed: all losses and accuracies, with the updates they belong to."""
    rows = read_rows(folder)
    steps = [(row["step"], row["loss"]) for row in rows_of("step", rows)]
    fields = ("step", "train_loss", "val_loss", "top1", "top5")
    return steps + [tuple(row[field] for field in fields) for row in rows_of("epoch", rows)]


@pytest.fixture(scope="module")
def output(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished rehearsal, trained in this process."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.common.matrix.subprocess", CHILDREN)
        assert call(MODULE, "--data", cifar10, "--output", folder, *SMALL) == 0
    return folder


def test_runs_are_compared(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(output / f"{run}-seed0") for run in ("3b", "steps")]
    assert compare.main([*folders, "--output", str(tmp_path)]) == 0
    header, _, *rows = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[:4])
    assert header[0].strip("| ") == "run"
    assert [row[0].strip("| ") for row in rows] == folders
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width >= 1200
    with pytest.raises(UserError, match="nowhere"):
        compare.main([str(tmp_path / "nowhere")])


def test_a_rehearsal_writes_table_json_and_picture(output: Path) -> None:
    result = read_object(output / "superconvergence.json")
    assert result["command"].startswith("python -m benchmarks.superconvergence --data")
    assert result["hardware"] and result["versions"]["torch"] and result["date"]
    assert result["precision"] == "fp32"
    data = result["data"]
    assert (data["train_images"], data["val_images"], data["dataset"]) == (500, 200, "CIFAR10")
    assert data["suffixes"] == {".jpg": 700}
    study, steps = result["runs"]
    summary = read_object(output / "3b-seed0" / "summary.json")
    assert (study["run"], study["n"], study["iterations"]) == ("3b", 1, 62)
    assert study["published"]["top1"] == 0.9308
    assert study["mean"] == study["lowest"] == study["highest"] == summary["top1"]
    accuracies = [row["top1"] for row in rows_of("epoch", read_rows(output / "3b-seed0"))]
    assert study["seeds"][0]["top1"] == accuracies[-1]
    assert study["seeds"][0]["best_top1"] == max(accuracies)
    assert study["train_seconds"] == summary["train_seconds"]
    assert (steps["run"], steps["published"], steps["recipe"]["max_lr"]) == ("steps", None, 0.05)
    assert {run["difference_points"] for run in result["runs"]} == {None}
    text = (output / "table.md").read_text()
    assert "Rehearsal (--epochs 2 --set model=smallnet" in text
    assert "not all of CIFAR-10): not what the recipes say" in text
    assert "The data here are JPEGs" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| 3b "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["3b", "0.05", "2", "1cycle (20, 10, 0.95, 0.85)", "62", "93.08 %"]
    assert cells[6:8] == [f"{100 * summary['top1']:.2f} % (1)", "-"]
    assert "<svg" in (output / "superconvergence.svg").read_text()
    assert (output / "superconvergence.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_repeated(
    output: Path, cifar10: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [path for path in output.rglob("*") if path.is_file() and path.parent != output]
    before = {path: path.stat().st_mtime_ns for path in runs}
    table_before = (output / "table.md").read_text()
    assert call(MODULE, "--data", cifar10, "--output", output, *SMALL) == 0
    assert capfd.readouterr().out.count("finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in runs} == before
    assert (output / "table.md").read_text() == table_before


def test_a_run_with_other_settings_is_refused(
    output: Path, cifar10: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data", cifar10, "--output", output, *SMALL, "--set", "max_lr=0.1")
    assert call(MODULE, *flags) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: --output: {output / '3b-seed0'} holds a run with another recipe")
    assert "recipe field max_lr: give the --data, --set," in err
    assert err.count("\n") == 1


def test_a_stopped_study_resumes_to_the_same_end(
    output: Path, cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of the second run: the first is in the table, and stays as it is."""
    first, second = tmp_path / "3b-seed0", tmp_path / "steps-seed0"
    shutil.copytree(output / first.name, first)
    process = start(MODULE, "--data", cifar10, "--output", tmp_path, *SMALL)
    deadline = time.monotonic() + 300
    while not rows_of("step", read_rows(second)) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    assert "run steps, seed 0: stopped" in out
    assert (second / "checkpoints" / "last.pt").exists()
    assert not (second / "summary.json").exists()
    rows = read_object(tmp_path / "superconvergence.json")["runs"]
    assert [row["run"] for row in rows] == ["3b"]
    finished = (first / "summary.json").stat().st_mtime_ns
    monkeypatch.setattr("benchmarks.common.matrix.subprocess", CHILDREN)
    assert call(MODULE, "--data", cifar10, "--output", tmp_path, *SMALL) == 0
    assert (first / "summary.json").stat().st_mtime_ns == finished
    for name in (first.name, second.name):
        assert curves(tmp_path / name) == curves(output / name)
    ended = [
        [row["mean"] for row in read_object(folder / "superconvergence.json")["runs"]]
        for folder in (tmp_path, output)
    ]
    assert ended[0] == ended[1]


def test_a_run_that_fails_does_not_keep_the_others_back(
    output: Path,
    cifar10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A file is where the folder of the first one should be."""
    monkeypatch.setattr("benchmarks.common.matrix.subprocess", CHILDREN)
    (tmp_path / "3b-seed0").write_text("in the way")
    shutil.copytree(output / "steps-seed0", tmp_path / "steps-seed0")
    assert call(MODULE, "--data", cifar10, "--output", tmp_path, *SMALL) == 1
    assert "run 3b, seed 0: ended with status 2" in capfd.readouterr().err
    assert [run["run"] for run in read_object(tmp_path / "superconvergence.json")["runs"]] == [
        "steps"
    ]
    text = (tmp_path / "table.md").read_text()
    assert "| steps " in text and "Failed with an error: run 3b, seed 0." in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "5"], "--only: invalid choice: '5' (choose from "),
        (["--runs", "0"], "--runs: must be at least 1"),
        (["--set", "max_lr=0"], "recipe field max_lr must be above 0"),
        (["--set", "phases.0.batch_size=501"], "is more than the 500 training images"),
        (["--data", "absent"], "absent: --data takes a folder with train/ and val/"),
    ],
)
def test_a_wrong_flag_is_named_and_nothing_written(
    flags: list[str], message: str, cifar10: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        main(["--data", str(cifar10), "--output", str(tmp_path / "out"), *flags])
    assert message in str(error.value)
    for name in (*STUDY, "1cycle", "steps", "steps-high") if "5" in flags else ():
        assert name in str(error.value)
    assert not (tmp_path / "out").exists()


def results(suffix: str, rehearsal: str = "") -> Row:
    """Run 4a with two seeds, as if measured."""
    seeds = [
        {
            "seed": seed, "folder": "-", "started": "-", "top1": top1, "best_top1": top1,
            "train_seconds": 600.0, "wall_seconds": 660.0, "images_per_sec": 7900.0,
        }
        for seed, top1 in enumerate((0.93, 0.94))
    ]  # fmt: skip
    run = run_result("4a", Plan.of(study_recipe("4a"), 1, 50_000), seeds, rehearsal)
    data = Data(
        name="cifar", dataset="CIFAR10", train_images=50_000, val_images=10_000,
        suffixes={suffix: 60_000},
    )  # fmt: skip
    return {
        "command": "-", "date": "-", "hardware": "-", "precision": "fp32", "accuracy": "-",
        "versions": {"torch": "-", "python": "-"}, "data": asdict(data), "rehearsal": rehearsal,
        "runs": [run], "failed": "",
    }  # fmt: skip


def test_the_difference_is_in_points_of_the_mean_over_the_seeds() -> None:
    measured = results(".png")
    assert measured["runs"][0]["difference_points"] == pytest.approx(93.5 - 93.39)
    text = table(measured)
    assert "| 93.39 %   | 93.50 %, 93.00 .. 94.00 (2) | +0.11 points | 10.0 min" in text
    assert "Rehearsal" not in text
    assert "The data here are .png files." in text
    assert "JPEG" not in text
    assert "The data here are JPEGs" in table(results(".jpeg"))
    assert "points" not in table(results(".png", rehearsal="--epochs 2"))
