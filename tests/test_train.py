"""The commands as a user types them, on real images through DALI."""

from __future__ import annotations

import gzip
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
import tomllib
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomli_w
import torch

from fastimagenet import run as runs
from fastimagenet.config import RunConfig
from fastimagenet.distributed.world import World
from fastimagenet.recipes import named_recipe
from fastimagenet.report.dawnbench import check_entry
from fastimagenet.report.run import rows_of
from fastimagenet.training import checkpoint
from fastimagenet.training.recorder import read_rows
from pipelines.errors import UserError
from tests.commands import (
    SMALL,
    TWO,
    error_of,
    evaluate,
    free_endpoint,
    losses_of,
    output_of,
    run,
    start,
    stop_soon,
    summary_of,
    train,
)
from tests.conftest import fill
from tests.test_checkpoint import RunsCode


def test_a_run_leaves_the_files_of_the_interface(finished: Path) -> None:
    plan = json.loads((finished / "plan.json").read_text())
    assert [phase["image_size"] for phase in plan["phases"]] == [8, 12, 16]
    rows = read_rows(finished)
    epochs = rows_of("epoch", rows)
    assert [row["image_size"] for row in epochs] == [8, 12, 16]
    assert [row["batch_size"] for row in epochs] == [50, 50, 25]
    assert [row["epoch"] for row in epochs] == [0, 1, 2]
    assert epochs[-1]["step"] == plan["total_steps"] == 10 + 10 + 20
    for row in rows_of("step", rows):
        assert {"time_seconds", "lr", "momentum", "loss", "images_per_sec"} <= set(row)
    (entry,) = finished.glob("dawnbench/*.json")
    check_entry(entry, entry.with_suffix(".tsv"))
    assert "<svg" in (finished / "report.html").read_text()
    assert sorted(path.name for path in finished.iterdir()) == [
        *("checkpoints", "dawnbench", "metrics.jsonl", "plan.json", "report.html", "summary.json")
    ]


def test_the_summary_adds_up(finished: Path) -> None:
    summary = summary_of(finished)
    split = summary["time_split_seconds"]
    assert sum(split.values()) == pytest.approx(summary["wall_seconds"], rel=1e-6)
    outside = split["evaluation"] + split["checkpoint"] + split["compile"]
    assert summary["train_seconds"] == pytest.approx(summary["wall_seconds"] - outside)
    assert summary["cost_usd"] == pytest.approx(2 * summary["train_seconds"] / 3600)
    last = rows_of("epoch", read_rows(finished))[-1]
    assert (summary["top1"], summary["tta_top1"]) == (last["top1"], last["tta_top1"])
    assert last["top1"] * 200 == pytest.approx(round(last["top1"] * 200))
    assert summary["target"] == {"metric": "top1", "value": 0.94}
    assert summary["time_to_target_seconds"] is None


def test_evaluate_gives_the_runs_own_figures(finished: Path, cifar10: Path) -> None:
    last = finished / "checkpoints" / "last.pt"
    flags = ("--data", cifar10, "--device", "cpu", "--json")
    out, _ = evaluate(last, *flags, "--tta", "flip+crop")
    result, summary = json.loads(out), summary_of(finished)
    assert result["images"] == 200
    for name in ("top1", "top5", "tta_top1", "tta_top5"):
        assert result[name] == summary[name], name
    out, _ = evaluate(last, *flags)
    assert json.loads(out)["tta_top1"] is None


def test_evaluate_takes_a_run_and_its_data_and_says_what_it_counted(finished: Path) -> None:
    out, err = evaluate(finished, "--device", "cpu", "--json")
    (note,) = err.splitlines()
    assert note.startswith("note: no --data given: ") and note.endswith(", as its run had")
    result = json.loads(out)
    assert result["checkpoint"] == str(finished / "checkpoints" / "best.pt")
    assert (result["epochs"], result["split"], result["image_size"]) == (3, "val", 16)
    rows = rows_of("epoch", read_rows(finished))
    best = rows[result["epoch"] - 1]
    assert best["top1"] == max(row["top1"] for row in rows)
    size = (12, 12, 16)[best["epoch"]]
    out, _ = evaluate(finished, "--device", "cpu", "--image-size", size)
    head, figures, *_ = out.splitlines()
    assert head.endswith(f"best.pt, epoch {result['epoch']} of 3, at {size} px")
    assert figures.startswith("200 images of val in ")
    assert f": top-1 {best['top1']:.2%}, top-5 {best['top5']:.2%}, " in figures


def test_evaluate_names_data_that_are_gone(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"data": "/nowhere/at/all"}')
    (tmp_path / "checkpoints").mkdir()
    _, err = evaluate(tmp_path, status=2)
    assert (
        err
        == f"error: {tmp_path} holds no checkpoints/best.pt: name a checkpoint, or a run's folder\n"
    )
    best = tmp_path / "checkpoints" / "best.pt"
    best.symlink_to(finished / "checkpoints" / "best.pt")
    _, err = evaluate(tmp_path, status=2)
    assert err == "error: --data: the data of the run, /nowhere/at/all, are not there: name them\n"


@pytest.fixture(scope="module")
def two_classes(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes under a name that is not UTF-8."""
    data = tmp_path_factory.mktemp("two") / os.fsdecode(b"photos-\xe9")
    for split in ("train", "val"):
        for name in ("cat", "ship"):
            (data / split).mkdir(parents=True, exist_ok=True)
            (data / split / name).symlink_to(cifar10 / split / name)
    return data


def test_a_path_that_is_not_utf8_and_results_that_are_missing(
    two_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"run-\xff")
    flags = ("--data", two_classes, "--output", folder, "--epochs", 1, *SMALL)
    flags += ("--set", "phases.*.batch_size=20")

    def fail(_: Path) -> None:
        raise ValueError("no such colour")

    with monkeypatch.context() as patched:
        patched.setattr("fastimagenet.report.summary.write_report", fail)
        out, err = train(*flags, status=1)
    note = (
        "note: --epochs 1 leaves no epoch to 2 of the recipe's 3 phases: what is left is at 12 px"
    )
    assert err.count(note) == 1
    assert note in train(*flags, "--dry-run")[0]
    assert "top-1 " in out and "top-5" not in out
    assert err.splitlines()[-1] == "error: not written: report.html (ValueError: no such colour)"
    summary = summary_of(folder)
    assert (summary["num_classes"], summary["top5"], summary["threads"]) == (
        2, None, torch.get_num_threads(),
    )  # fmt: skip
    assert list((folder / "dawnbench").glob("*.tsv"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        out, _ = train(*flags, "--resume", "auto")
    finally:
        torch.set_num_threads(threads)
    assert f"report: {folder / 'report.html'}" in out
    rounding = "equal to a run without a stop up to rounding only"
    assert f", on {threads + 1} threads in place of {threads}: {rounding}\n" in out
    assert summary_of(folder) == summary
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert note.replace("'", "&#39;") in page
    assert r"photos-\xe9" in page and "TTA top-1" in page and "TTA top-5" not in page
    (folder / "summary.json").unlink()
    train(*flags, "--resume", "auto")
    again = summary_of(folder)
    assert (again["started"], again["top1"]) == (summary["started"], summary["top1"])
    out, _ = train(*flags, "--resume", "auto")
    assert "is finished: nothing is left to train" in out
    out, _ = run("fastimagenet.report", folder)  # to a pipe, which gets the very bytes
    assert out.endswith("run-\ufffd/report.html\n")


def test_a_top5_target_needs_more_than_five_classes(two_classes: Path) -> None:
    target = ("--set", "target=top5=0.9")
    message = error_of("--data", two_classes, *SMALL, *target)
    assert (
        "recipe field target = 'top5=0.9' says nothing of 2 classes: --set target=top1" in message
    )
    assert error_of("--data", two_classes, *SMALL, *target, "--dry-run") == message


def test_evaluate_refuses_other_data(finished: Path, digits: Path) -> None:
    last = finished / "checkpoints" / "last.pt"
    _, err = evaluate(last, "--data", digits, "--device", "cpu", status=2)
    assert "knows 10 classes, --data has 10, and the first that differ are airplane and 0:" in err


@pytest.mark.parametrize(
    ("backend", "size", "message"),
    [
        ("dali", 60_000, "--image-size 60000: a batch of 25 such images does not fit into memory"),
        (
            "torchvision",
            60_000,
            "--backend torchvision with 2 workers and batches of 25 at 60000 px",
        ),
    ],
)
def test_evaluate_names_an_image_size_that_is_too_large(
    backend: str, size: int, message: str, finished: Path, cifar10: Path
) -> None:
    flags = ("--data", cifar10, "--device", "cpu", "--backend", backend, "--image-size", size)
    if backend == "torchvision":  # refused before there is any
        _, err = evaluate(finished / "checkpoints" / "last.pt", *flags, status=2)
        assert err.startswith(f"error: {message}")
        return
    process = start("fastimagenet.evaluate", finished / "checkpoints" / "last.pt", *flags)
    # A kernel that promises more memory than there is would kill other processes, too.
    resource.prlimit(process.pid, resource.RLIMIT_AS, (1 << 36, 1 << 36))
    _, err = process.communicate(timeout=600)
    (line,) = err.splitlines()
    assert process.returncode == 2 and line.startswith(f"error: {message}")


def test_evaluate_names_an_image_size_that_no_jpeg_has(finished: Path, cifar10: Path) -> None:
    flags = ("--data", cifar10, "--device", "cpu", "--image-size", 100_000)
    _, err = evaluate(finished / "checkpoints" / "last.pt", *flags, status=2)
    assert err == "error: --image-size must be from 8 to 65535 pixels, not 100000\n"


def test_another_seed_gives_other_losses(finished: Path, cifar10: Path, tmp_path: Path) -> None:
    """That the same one gives the same, bit for bit, is seen in test_signals.py."""
    train("--data", cifar10, "--output", tmp_path / "other", *SMALL, "--seed", 1, "--epochs", 1)
    assert losses_of(tmp_path / "other")[0] != losses_of(finished)[0]


@pytest.mark.slow
def test_a_stopped_run_saves_and_goes_on_to_the_same_end(
    finished: Path, cifar10: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    out = stop_soon("--data", cifar10, "--output", folder, *SMALL)
    assert f"resume with --output {folder} --resume auto" in out
    assert not (folder / "summary.json").exists()
    flags = ("--data", cifar10, "--output", folder, *SMALL, "--resume", "auto")
    assert "another seed: --seed 0" in error_of(*flags, "--seed", 7)
    assert "another recipe (max_lr): give the --rec" in error_of(*flags, "--set", "max_lr=0.1")
    (folder / "dawnbench").mkdir()
    (folder / "dawnbench" / "old.tsv").touch()  # as of a run that had ended at its target
    train(*flags)
    assert not (folder / "dawnbench" / "old.tsv").exists()
    assert losses_of(folder) == losses_of(finished)
    assert summary_of(folder)["top1"] == summary_of(finished)["top1"]


@pytest.mark.slow
def test_two_processes_give_the_validation_counts_of_one(cifar10: Path, undisturbed: Path) -> None:
    """Trained and evaluated by two over gloo; the checkpoint is evaluated again by one."""
    summary = summary_of(undisturbed)
    assert summary["world_size"] == 2
    assert summary["time_split_seconds"]["communication"] > 0
    epochs = rows_of("epoch", read_rows(undisturbed))
    assert [row["step"] for row in epochs] == [5, 10, 20]
    out, _ = evaluate(
        *(undisturbed / "checkpoints" / "last.pt", "--data", cifar10, "--device", "cpu", "--json"),
        *("--tta", "flip+crop"),
    )
    alone = json.loads(out)
    for name in ("top1", "top5", "tta_top1", "tta_top5"):
        assert alone[name] == summary[name], name


@pytest.mark.slow
def test_a_stopped_group_saves_and_one_process_resumes(cifar10: Path, tmp_path: Path) -> None:
    """That two resume bit for bit is seen where one of them is killed, in test_faults.py."""
    folder = tmp_path / "stopped"
    stop_soon("--data", cifar10, *TWO, "--output", folder, after="epoch.pt")
    assert (folder / "checkpoints" / "last.pt").exists()
    flags = ("--data", cifar10, "--output", folder, *SMALL)
    out, _ = train(*flags, "--resume", folder / "checkpoints" / "epoch.pt")
    assert ", processes 2 -> 1, global batch 100 -> 50, lr " in out
    epochs = rows_of("epoch", read_rows(folder))
    assert [row["epoch"] for row in epochs] == [0, 1, 2]
    assert epochs[-1]["step"] == 40


@pytest.mark.slow
def test_one_process_that_adds_up_gradients_does_what_two_do(
    cifar10: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Up to rounding, in fp32. Running statistics of BN are not compared: two processes keep
    those of the first one's batches, one process those of all."""
    flags = ("--data", cifar10, *SMALL)
    out, _ = train(*flags, "--output", tmp_path / "one", "--global-batch", 100)
    assert "an update accumulates the gradients of 2 micro-batches" in out
    folders = (tmp_path / "one", undisturbed)
    one, two = (checkpoint.load(folder / "checkpoints" / "last.pt") for folder in folders)
    assert one["step"] == two["step"] == 20
    for name, value in two["model"].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(one["model"][name], value, rtol=1e-3, atol=1e-4)
    message = error_of(*flags, "--output", tmp_path / "odd", "--global-batch", 75)
    assert "--global-batch must be a multiple of 50" in message
    message = error_of(*flags, "--output", tmp_path / "odd", "--global-batch", 5000)
    assert message.endswith("training images: --global-batch 500 or less")


@pytest.mark.slow
def test_under_torchrun(cifar10: Path, tmp_path: Path) -> None:
    flags = ("--standalone", "--nnodes", 1, "--nproc-per-node", 2, "-m", "fastimagenet.train")
    arguments = ("--data", cifar10, "--output", tmp_path / "run", *SMALL)
    changes = ("--backend", "synthetic", "--set", "bf16_gradients=true")
    run("torch.distributed.run", *flags, *arguments, *changes, "--epochs", 1)
    assert summary_of(tmp_path / "run")["world_size"] == 2


def test_compiling_is_warmed_up_before_the_clock(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch.compile's tracing but no C++; compiled losses are tested elsewhere."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    changes = ("--epochs", 1, "--set", "compile=true")
    train("--data", cifar10, "--output", tmp_path / "run", *SMALL, *changes)
    summary = summary_of(tmp_path / "run")
    split = summary["time_split_seconds"]
    assert split["compile"] > 0
    outside = split["compile"] + split["evaluation"] + split["checkpoint"]
    assert summary["train_seconds"] == pytest.approx(summary["wall_seconds"] - outside)


@pytest.mark.slow
def test_a_resnet_learns_photographs_at_two_growing_sizes(
    photographs: Path, tmp_path: Path
) -> None:
    """The smallest of the ResNets on the first photographs; they are decoded from full size."""
    folder, data = tmp_path / "run", tmp_path / "data"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        for path in sorted((photographs / split).iterdir())[:20]:
            (data / split / path.name).symlink_to(path)
    phases = ", ".join(
        f"{{epochs = {epochs}, image_size = {size}, batch_size = 10}}"
        for epochs, size in ((6, 32), (2, 40))
    )
    train(
        *("--data", data, "--recipe", "imagenet", "--device", "cpu", "--output", folder),
        *("--set", f"phases=[{phases}]", "--set", "lr_spans=[[0, 1, 0.1, 1], [1, 8, 1, 0]]"),
        *("--set", "model=resnet18", "--set", "max_lr=0.03", "--set", "lr_reference_batch=0"),
        *("--set", "eval_every_epochs=8", "--set", "label_smoothing=0.0", "--precision", "fp32"),
    )
    epochs = rows_of("epoch", read_rows(folder))
    assert [row["image_size"] for row in epochs] == [32] * 6 + [40] * 2
    assert epochs[-1]["train_loss"] < math.log(20) / 2, "half of what guessing gives"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m fastimagenet.train --print-recipe | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_profile_is_a_trace_of_ten_steps(cifar10: Path, tmp_path: Path) -> None:
    flags = ("--data", cifar10, "--output", tmp_path / "run", *SMALL, "--profile")
    train(*flags, "--epochs", 2, "--set", "eval_every_epochs=2")
    with gzip.open(tmp_path / "run" / "profile" / "rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert len(steps) == 10
    assert any("convolution_backward" in name for name in names)


def test_list_print_and_dry_run(cifar10: Path, tmp_path: Path) -> None:
    out, _ = train("--list-recipes")
    assert [line.split()[0] for line in out.splitlines()][:2] == ["digits", "photos"]
    toml, _ = train("--print-recipe", "--recipe", "imagenet", "--nodes", 4)
    (tmp_path / "mine.toml").write_text(toml)
    again, _ = train("--print-recipe", "--recipe", tmp_path / "mine.toml")
    assert again == toml
    out, _ = train("--dry-run", "--data", cifar10, *SMALL, "--nproc-per-node", 2)
    assert "500 training images, world size 2" in out
    assert "  data: 500 training and 200 validation images, 10 classes\n" in out
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.toml"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--recipe", "resnet"],
            "--recipe resnet is neither a recipe nor a .toml file: known are digits",
        ),
        (["--set", "max_lr=0"], "recipe field max_lr must be above 0"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--nodes", "0"], "--nodes: must be at least 1"),
        (["--nodes", "3:2"], "--nodes: 3:2: 1 <= MIN <= MAX must hold"),
        (["--seed", "-1"], "--seed must be from 0 to 9223372036854775807 (2^63 - 1), not -1"),
        (["--seed", "9" * 23], "--seed must be from 0 to 9223372036854775807"),
        (["--author", " "], "--author must not be empty"),
        (["--hardware", " "], "--hardware must not be empty"),
        (["--cost-per-hour", "nan"], "--cost-per-hour must be a number of US dollars"),
        (["--device", "cuda"], "--device cuda: no CUDA device is there"),
        (["--nodes", "2"], "--nodes 2 needs --rdzv-endpoint HOST:PORT"),
        (["--optimizer-backend", "apex"], "NVIDIA apex is not installed; build NVIDIA apex from"),
        (["--timeout", "0"], "--timeout must be above 0 seconds"),
        (["--bucket-mb", "0"], "--bucket-mb must be above 0"),
        (["--max-restarts", "-1"], "--max-restarts must be 0 or more"),
        (["--nodes", "1:2"], "--nodes 2 needs --rdzv-endpoint HOST:PORT"),
        (["--nodes", "2", "--rdzv-endpoint", "host"], "--rdzv-endpoint must be HOST:PORT"),
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--set", "target=", "--stop-at-target"], "--stop-at-target needs a target"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--resume", "none.pt"], "checkpoint none.pt does not exist"),
    ],
)
def test_a_wrong_flag_is_one_line_and_nothing_written(
    flags: list[str],
    message: str,
    cifar10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "apex" in flags and find_spec("apex"):
        pytest.skip("apex is installed here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "out"
    device = () if "--device" in flags else ("--device", "cpu")
    recipe = () if "--recipe" in flags else ("--recipe", "tests/small.toml")
    assert message in error_of("--data", cifar10, "--output", folder, *device, *recipe, *flags)
    assert not folder.exists()


def test_wrong_data_is_one_line_that_names_the_path(cifar10: Path, tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--output", tmp_path / "out")
    assert "absent" in error_of("--data", tmp_path / "absent", *flags)
    data = tmp_path / "data"
    shutil.copytree(cifar10, data)
    (data / "train" / "cat" / "notes.jpg").write_text("no image")
    assert "train/cat/notes.jpg" in error_of("--data", data, *flags)
    (data / "train" / "cat" / "notes.jpg").unlink()
    shutil.rmtree(data / "val" / "dog")
    assert "dog" in error_of("--data", data, *flags)
    for folder in (*data.glob("train/[!c]*"), *data.glob("val/[!c]*")):
        shutil.rmtree(folder)
    one_class = f"error: {data}/train has one class, cat: there is nothing to tell apart"
    assert error_of("--data", data, *flags).startswith(one_class)
    _, error = output_of("fastimagenet.lr_find", "--data", data, *flags, status=2)
    assert error.startswith(one_class) and error.count("\n") == 1
    _, error = evaluate("none.pt", "--data", data, status=2)
    assert error.startswith(f"error: {data}/val has one class, cat: ")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reads_what_the_run_reads(cifar10: Path, tmp_path: Path) -> None:
    """Its counts and notes, images below class folders, skipped and bad ones included."""
    data = tmp_path / "data"
    shutil.copytree(cifar10, data)
    below = data / "train" / "cat" / "more"
    below.mkdir()
    images = sorted((data / "train" / "cat").glob("*.*"))
    for image in images[:20]:
        image.rename(below / image.name)
    images[20].rename(data / "train" / "loose.png")
    images[21].write_bytes(images[21].read_bytes()[:200])
    (data / "val" / "@eaDir").mkdir()
    skip_list = tmp_path / "skip.txt"
    skip_list.write_text(f"train/cat/more/{images[0].name}\nno/such.png\n")
    flags = ("--data", data, *SMALL, "--epochs", 1, "--skip-list", skip_list)
    bad = f"error: {images[21]} is truncated"
    assert error_of(*flags, "--dry-run").startswith(bad)
    flags = (*flags, "--on-bad-image", "skip")
    plan, notes = train(*flags, "--dry-run")
    assert "  data: 497 training and 200 validation images, 10 classes\n" in plan
    out, err = train(*flags, "--output", tmp_path / "run")
    first_epoch = [line for line in err.splitlines() if not line.startswith("note: --epochs")]
    assert notes.splitlines() == first_epoch and len(first_epoch) == 4
    told = [line for line in plan.splitlines() if not line.startswith("note: ")]
    assert "\n".join(told) in out
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert found["data"] == str(data) and found["notes"][1:] == first_epoch
    assert (found["num_train"], found["num_val"]) == (497, 200)


def test_a_run_is_not_resumed_on_other_images(
    finished: Path, cifar10: Path, tmp_path: Path
) -> None:
    """As many images, some of them swapped between training and validation."""
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(finished, folder)
    shutil.copytree(cifar10, data)
    flags = ("--data", data, "--output", folder, "--resume", "auto", *SMALL)
    out, _ = train(*flags)
    assert "is finished: nothing is left to train" in out, "another place is no other data"
    one, other = (next((data / split / "cat").iterdir()) for split in ("train", "val"))
    one.rename(tmp_path / "one")
    other.rename(one)
    (tmp_path / "one").rename(other)
    assert "of a run with other images, though as many" in error_of(*flags)
    last = folder / "checkpoints" / "last.pt"
    state = checkpoint.load(last)
    del state["images"]  # as releases before this one wrote them
    checkpoint.save(last, state)
    assert "nothing is left to train" in train(*flags)[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ((0, (400, 200)), "the processes see different images, (400, 200) and (500, 200)"),
        ((1, "34"), "the processes see as many images, but of other names, classes or sizes"),
        ((3, 1), "--seed: the processes differ"),
    ],
)
def test_processes_that_were_asked_for_others_are_told(
    changed: tuple[int, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gathered(value: tuple[object, ...], *_: object) -> list[tuple[object, ...]]:
        place, other = changed
        return [value, (*value[:place], other, *value[place + 1 :])]

    monkeypatch.setattr(runs, "gather_objects", gathered)
    config = RunConfig(recipe=named_recipe("digits"))
    with pytest.raises(UserError) as caught:
        runs.check_same_on_all_ranks(config, config.recipe, (500, 200), "12", World())
    assert message in str(caught.value)


def test_a_corrupt_jpeg_is_named(cifar10: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(cifar10, data)
    broken = next((data / "train" / "ship").iterdir())
    broken.write_bytes(broken.read_bytes()[:200])
    message = error_of("--data", data, "--output", tmp_path / "out", *SMALL)
    assert str(broken) in message
    assert "--skip-list" in message
    output = tmp_path / "skipped"
    flags = ("--on-bad-image", "skip", "--epochs", 1)
    _, err = train("--data", data, "--output", output, *flags, *SMALL)
    _, left_out = err.splitlines()  # after the note of what --epochs leaves out
    assert left_out.startswith(f"left out 1 bad file of 500; the first: {broken} is truncated")
    plan = json.loads((output / "plan.json").read_text())
    assert (plan["num_train"], plan["left_out"]) == (499, 1)
    flags = ("--on-bad-image", "skip", "--nproc-per-node", 2, "--set", "max_lr=1e9")
    flags += ("--backend", "synthetic")
    _, err = train("--data", data, "--output", tmp_path / "two", *flags, *SMALL, status=2)
    note, error = err.splitlines()  # each once, of two processes
    assert note.startswith("left out 1 bad file of 500; ")
    assert error.startswith("error: the loss is not finite at step ")


def test_an_output_folder_with_another_run_is_left_alone(finished: Path, cifar10: Path) -> None:
    before = everything_in(finished)
    message = error_of("--data", cifar10, "--output", finished, *SMALL)
    assert "holds another run" in message
    assert everything_in(finished) == before


def test_resuming_needs_to_know_which_run(finished: Path, cifar10: Path, tmp_path: Path) -> None:
    flags = ("--data", cifar10, *SMALL)
    assert "--resume auto needs the --output" in error_of(*flags, "--resume", "auto")
    last = finished / "checkpoints" / "last.pt"
    shutil.copytree(finished, tmp_path / "other")
    message = error_of(*flags, "--resume", last, "--output", tmp_path / "other")
    assert "holds another run" in message


def everything_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_finished_run_is_not_written_again(finished: Path, cifar10: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = everything_in(folder)
    out, _ = train("--data", cifar10, "--output", folder, "--resume", "auto", *SMALL)
    assert f"the run in {folder} is finished: nothing is left to train" in out
    assert everything_in(folder) == before
    shutil.rmtree(folder / "checkpoints")
    before = everything_in(folder)
    message = error_of("--data", cifar10, "--output", folder, "--resume", "auto", *SMALL)
    assert "holds another run's summary.json and no checkpoint to resume from" in message
    assert everything_in(folder) == before


def test_a_checkpoint_of_a_release_with_another_order_of_fields_is_of_the_same_run(
    finished: Path, cifar10: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    last = folder / "checkpoints" / "last.pt"
    state = checkpoint.load(last)
    fields = tomllib.loads(state["recipe"])
    state["recipe"] = tomli_w.dumps(dict(reversed(fields.items())))
    checkpoint.save(last, state)
    out, _ = train("--data", cifar10, "--output", folder, "--resume", "auto", *SMALL)
    assert "is finished: nothing is left to train" in out


def test_nodes_that_were_asked_for_different_runs_are_told(cifar10: Path, tmp_path: Path) -> None:
    common = ("--data", cifar10, "--output", tmp_path / "run", *SMALL, "--nodes", 2)
    common = (*common, "--rdzv-endpoint", free_endpoint())
    nodes = [start("fastimagenet.train", *common, "--seed", seed) for seed in range(2)]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2]
    assert "error: --seed: the processes differ: type the same command on every node\n" in said
    assert not list(tmp_path.glob("run/*"))


def test_a_diverging_run_names_step_and_lr(cifar10: Path, tmp_path: Path) -> None:
    message = error_of(
        *("--data", cifar10, "--output", tmp_path / "out", *SMALL, "--set", "max_lr=1e9")
    )
    assert "the loss is not finite at step" in message


def test_a_folder_that_cannot_be_made_is_one_line(cifar10: Path) -> None:
    message = error_of("--data", cifar10, "--output", "/proc/fastimagenet", *SMALL)
    assert message == "error: cannot use /proc/fastimagenet: No such file or directory"


def test_a_disk_that_is_full_at_the_start_is_one_line(cifar10: Path, small_disk: Path) -> None:
    fill(small_disk)
    message = error_of("--data", cifar10, "--output", small_disk / "out", *SMALL)
    assert "No space left on device" in message


def test_a_disk_that_fills_up_does_not_end_the_run(
    finished: Path, cifar10: Path, small_disk: Path
) -> None:
    output = small_disk / "out"
    last = output / "checkpoints" / "last.pt"
    flags = ("--data", cifar10, "--output", output, *SMALL)
    ended = threading.Event()

    def fill_it() -> None:
        while not ended.wait(0.002):
            if last.exists():
                fill(small_disk)

    filler = threading.Thread(target=fill_it)
    filler.start()
    try:
        out, err = train(*flags, "--checkpoint-steps", 3, status=1)
    finally:
        ended.set()
        filler.join()
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert any("checkpoint of step" in line for line in warnings)
    error = err.splitlines()[-1]
    assert error.startswith("error: not written: ")
    assert "checkpoint of step 40 (No space left on device)" in error
    assert "epoch   3" in out  # it has trained and evaluated to the end of the recipe
    (small_disk / "filler").unlink()
    assert checkpoint.load(last)["step"] < 40
    train(*flags, "--resume", "auto")
    assert summary_of(output)["top1"] == summary_of(finished)["top1"]


@pytest.mark.parametrize("damage", ["bit-flipped", "truncated"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage: str, finished: Path, cifar10: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    last = folder / "checkpoints" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content if damage == "bit-flipped" else content[: len(content) // 2])
    flags = ("--data", cifar10, "--output", folder, *SMALL, "--resume", "auto")
    out, err = train(*flags)
    note = f"note: checkpoint {last} cannot be read"
    assert note in err and f"resuming from {last.with_name('previous.pt')}" in err
    assert "resumed at step 20" in out
    assert losses_of(folder) == losses_of(finished)
    assert summary_of(folder)["top1"] == summary_of(finished)["top1"]
    weights = [checkpoint.load(f / "checkpoints" / "last.pt")["model"] for f in (folder, finished)]
    for name, value in weights[1].items():
        assert torch.equal(weights[0][name], value), name
    if damage == "truncated":
        for name in ("last.pt", "previous.pt", "epoch.pt"):
            last.with_name(name).write_bytes(b"")
        assert "last.pt cannot be read" in train(*flags, status=2)[1]


def test_a_hostile_checkpoint_is_refused_and_its_code_not_run(
    cifar10: Path, tmp_path: Path
) -> None:
    """With a checksum that holds, by each of the commands' ways to read one."""
    mark, last = tmp_path / "ran", tmp_path / "run" / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    torch.save({"recipe": "", "model": RunsCode(mark)}, last)
    with last.open("r+b") as file:
        checkpoint.seal(file)
    unsealed = tmp_path / "unsealed.pt"
    torch.save({"recipe": "", "model": RunsCode(mark)}, unsealed)
    flags, output = ("--data", cifar10, "--device", "cpu"), ("--output", tmp_path / "run", *SMALL)
    said = (
        (last, train(*flags, *output, "--resume", "auto", status=2)),
        (last, train(*flags, *output, "--resume", last, status=2)),
        (last, evaluate(last, *flags, status=2)),
        (unsealed, evaluate(unsealed, *flags, status=2)),
    )
    for path, (_, err) in said:
        (line,) = err.splitlines()
        assert line.startswith(f"error: checkpoint {path} cannot be read, take another one: ")
    assert not mark.exists()
    torch.load(last, weights_only=False)
    assert mark.exists()  # it would have run
