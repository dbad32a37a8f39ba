"""DAWNBench entries field by field, the contest's rules, and how a run folder is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastimagenet.report.dawnbench import check_entry, write_entry
from fastimagenet.report.run import time_to_target
from fastimagenet.training.recorder import read_rows
from pipelines.errors import UserError
from pipelines.files import Row

SUMMARY: Row = {
    "recipe": "sample", "seed": 7, "world_size": 8, "device": "cuda", "hardware": "8x Sample GPU",
    "versions": {"torch": "2.15.0"}, "epochs": 4, "steps": 40, "top1": 0.945, "top5": 0.9985,
    "tta_top1": 0.9512, "tta_top5": 0.999, "best_epoch": 3, "train_seconds": 360.0,
    "eval_seconds": 12.0, "data_wait_seconds": 8.0, "wall_seconds": 400.0,
    "time_split_seconds": {
        "start_up": 5.0, "compile": 20.0, "data_wait": 8.0, "compute": 320.0,
        "communication": 27.0, "evaluation": 12.0, "checkpoint": 3.0, "other": 5.0,
    },
    "images_per_sec": 12345.6, "target": {"metric": "top1", "value": 0.94},
    "time_to_target_seconds": 270.0, "cost_usd": None, "author": "Ada Byron",
    "author_email": "ada@example.org", "framework": "PyTorch 2.15.0", "model": "resnet18",
    "precision": "bf16", "backend": "dali", "data": "cifar10", "command": "train --seed 7",
    "started": "2024-02-29T23:59:58+00:00", "cost_per_hour": None, "num_classes": 10,
    "dataset": "CIFAR10",
}  # fmt: skip
# Per epoch: training seconds, top-1, top-5, TTA top-1; the second epoch is not evaluated.
EPOCHS = [(90.0, 0.5, 0.9, None), (180.0, None, None, None), (270.0, 0.9412, 0.998, None),
          (360.0, 0.945, 0.9985, 0.9512)]  # fmt: skip


def epoch_rows() -> list[Row]:
    return [
        {"kind": "epoch", "step": 10 * epoch + 10, "epoch": epoch, "time_seconds": seconds + 20,
         "train_seconds": seconds, "eval_seconds": 3.0 * epoch + 3,
         "data_wait_seconds": 2.0 * epoch + 2, "train_loss": 2.0 / (epoch + 1),
         "val_loss": None if top1 is None else 1.9 / (epoch + 1),
         "top1": top1, "top5": top5, "tta_top1": tta, "tta_top5": None if tta is None else 0.999,
         "image_size": 16 if epoch < 2 else 32, "batch_size": 512}
        for epoch, (seconds, top1, top5, tta) in enumerate(EPOCHS)
    ]  # fmt: skip


def write_run(folder: Path, rows: list[Row] | None = None, **changes: Any) -> Path:
    """A run folder with `summary.json` (changed) and `metrics.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))
    lines = [json.dumps(row) for row in (epoch_rows() if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def test_cifar10_entry_field_by_field(tmp_path: Path) -> None:
    json_path, tsv_path = write_entry(write_run(tmp_path))
    assert json_path.parent == tmp_path / "dawnbench"
    assert json_path.name == "Ada-Byron_resnet18_8x-Sample-GPU_PyTorch-2.15.0.json"
    assert tsv_path.name == json_path.stem + ".tsv"
    entry = json.loads(json_path.read_text())
    misc = entry.pop("misc")
    assert entry == {
        "version": "v1.0",
        "author": "Ada Byron",
        "authorEmail": "ada@example.org",
        "framework": "PyTorch 2.15.0",
        "model": "resnet18",
        "hardware": "8x Sample GPU",
        "timestamp": "2024-02-29",
    }
    assert (misc["seed"], misc["versions"], misc["command"]) == (
        7,
        {"torch": "2.15.0"},
        "train --seed 7",
    )
    assert (misc["trainSeconds"], misc["evaluationSeconds"], misc["wallSeconds"]) == (360, 12, 400)
    assert misc["ttaTop1Accuracy"] == 95.12
    assert misc["backend"] == "dali"
    assert "evaluation" in misc["clock"]
    # Hours by hand: 90 / 3600, 270 / 3600, 360 / 3600. The epoch without evaluation has no row.
    assert tsv_path.read_text() == (
        "epoch\thours\ttop1Accuracy\n"
        "1\t0.02500000\t50.0000\n"
        "3\t0.07500000\t94.1200\n"
        "4\t0.10000000\t94.5000\n"
    )
    check_entry(json_path, tsv_path)


def test_imagenet_entry_has_top5_blacklist_and_price(tmp_path: Path) -> None:
    run = write_run(tmp_path, dataset="ImageNet", cost_per_hour=24.5)
    json_path, tsv_path = write_entry(run)
    entry = json.loads(json_path.read_text())
    assert entry["usedBlacklist"] is True
    assert entry["costPerHour"] == 24.5
    lines = tsv_path.read_text().splitlines()
    assert lines[0] == "epoch\thours\ttop1Accuracy\ttop5Accuracy"
    assert lines[-1] == "4\t0.10000000\t94.5000\t99.8500"
    check_entry(json_path, tsv_path)


def test_other_data_take_the_imagenet_columns_only(tmp_path: Path) -> None:
    json_path, tsv_path = write_entry(write_run(tmp_path, dataset="digits"))
    assert tsv_path.read_text().startswith("epoch\thours\ttop1Accuracy\ttop5Accuracy\n")
    assert "usedBlacklist" not in json.loads(json_path.read_text())


def test_file_names_are_safe_and_have_four_parts(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, author="../J\u00f6rg_<script>", hardware="a/b\\c: " + 200 * "x", model="\u7f51"
    )
    json_path, tsv_path = write_entry(run)
    assert json_path.resolve().parent == (tmp_path / "dawnbench").resolve()
    author, model, hardware, framework = json_path.stem.split("_")
    assert (author, model, framework) == ("Jorg-script", "unnamed", "PyTorch-2.15.0")
    assert hardware.startswith("a-b-c-x") and len(json_path.name) < 255
    assert json.loads(json_path.read_text())["author"] == "../J\u00f6rg_<script>"
    check_entry(json_path, tsv_path)


def test_no_entry_without_evaluation(tmp_path: Path) -> None:
    assert write_entry(write_run(tmp_path, rows=epoch_rows()[1:2])) == []
    assert not (tmp_path / "dawnbench").exists()


@pytest.mark.parametrize("field, key", [("author_email", "authorEmail"), ("author", "author")])
def test_a_run_without_a_required_field_writes_nothing(
    tmp_path: Path, field: str, key: str
) -> None:
    with pytest.raises(UserError, match=f"{key} is required"):
        write_entry(write_run(tmp_path, **{field: " "}))
    assert not (tmp_path / "dawnbench").exists()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"version": "1.0"}, "version should be v1.0"),
        ({"author": ""}, "author is required"),
        ({"hardware": None}, "hardware is required"),
        ({"model": 18}, "model is required"),
        ({"timestamp": "2023-02-29"}, "yyyy-mm-dd"),
        ({"timestamp": "20240229"}, "yyyy-mm-dd"),
        ({"timestamp": "29.02.2024"}, "yyyy-mm-dd"),
        ({"costPerHour": "$24"}, "costPerHour"),
        ({"costPerHour": -1}, "costPerHour"),
        ({"misc": []}, "misc"),
        ({"usedBlacklist": "yes"}, "usedBlacklist"),
        ({"usedBlacklist": True}, "top5Accuracy is required"),
    ],
)
def test_wrong_json_is_refused_with_the_reason(tmp_path: Path, change: Row, reason: str) -> None:
    json_path, tsv_path = write_entry(write_run(tmp_path))
    json_path.write_text(json.dumps(json.loads(json_path.read_text()) | change))
    with pytest.raises(UserError, match=reason):
        check_entry(json_path, tsv_path)


@pytest.mark.parametrize(
    "table, reason",
    [
        ("", "column epoch"),
        ("epoch\thours\n1\t.1\n", "column top1Accuracy"),
        ("epoch\thours\ttop1Accuracy\n", "at least one row"),
        ("epoch\thours\ttop1Accuracy\n1\t.1\n", ":2: 3 fields"),
        ("epoch\thours\ttop1Accuracy\n1\t.1\tx\n", ":2: top1Accuracy is not a number"),
        ("epoch\thours\ttop1Accuracy\n1.5\t.1\t9\n", ":2: epoch is not a number"),
        ("epoch\thours\ttop1Accuracy\n1\t.1\t100.5\n", ":2: top1Accuracy should be in 0..100"),
        ("epoch\thours\ttop1Accuracy\n1\t.1\tnan\n", ":2: top1Accuracy should be in 0..100"),
        ("epoch\thours\ttop1Accuracy\n1\t.1\t9\n2\t.1\t9\n", ":3: hours should rise"),
        ("epoch\thours\ttop1Accuracy\n1\t.2\t9\n2\t.1\t9\n", ":3: hours should rise"),
        ("epoch\thours\ttop1Accuracy\n1\t-.2\t9\n", ":2: hours should rise"),
        ("epoch\thours\ttop1Accuracy\n1\tinf\t9\n", ":2: hours should rise"),
        ("epoch\thours\ttop1Accuracy\n2\t.1\t9\n2\t.2\t9\n", ":3: epoch should rise"),
    ],
)
def test_wrong_table_is_refused_with_the_reason(tmp_path: Path, table: str, reason: str) -> None:
    json_path, tsv_path = write_entry(write_run(tmp_path))
    tsv_path.write_text(table)
    with pytest.raises(UserError, match=reason):
        check_entry(json_path, tsv_path)


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    json_path, tsv_path = write_entry(write_run(tmp_path))
    tsv_path.write_text("top1Accuracy\tepoch\thours\r\n10\t1\t0.5\r\n5\t2\t0.6\r\n")
    check_entry(json_path, tsv_path)


def test_names_of_the_pair_are_checked(tmp_path: Path) -> None:
    json_path, tsv_path = write_entry(write_run(tmp_path))
    other = tsv_path.rename(tsv_path.with_name("a_b_c_d.tsv"))
    with pytest.raises(UserError, match=r"NAME\.json and NAME\.tsv"):
        check_entry(json_path, other)
    plain = (
        json_path.rename(json_path.with_name("entry.json")),
        other.rename(other.with_name("entry.tsv")),
    )
    with pytest.raises(UserError, match=r"\[author\]_\[model\]"):
        check_entry(*plain)


def test_time_to_target_is_the_first_evaluated_epoch_that_reaches_it() -> None:
    rows = epoch_rows()
    assert time_to_target(rows, "top1", 0.94) == 270.0
    assert time_to_target(rows, "top1", 0.9412) == 270.0
    assert time_to_target(rows, "top1", 0.9413) == 360.0
    assert time_to_target(rows, "top5", 0.9) == 90.0
    assert time_to_target(rows, "top1", 0.9451) is None
    assert time_to_target([], "top1", 0.1) is None


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "epoch", "step": 30, "epo')
    assert read_rows(run) == epoch_rows()


def test_rows_with_nan_are_read(tmp_path: Path) -> None:
    rows = epoch_rows()
    rows[-1]["train_loss"] = math.nan
    assert math.isnan(read_rows(write_run(tmp_path, rows=rows))[-1]["train_loss"])
