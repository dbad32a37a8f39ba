"""The command lr_find: what it leaves, says and refuses, on the embedded digits."""

from __future__ import annotations

import json
import math
import os
import pty
import shlex
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

import fastimagenet
from fastimagenet import cli
from fastimagenet import run as runs
from fastimagenet.config import DataConfig, RunConfig
from fastimagenet.distributed.world import World
from fastimagenet.images import read_data
from fastimagenet.lr_find import main
from fastimagenet.lr_finder.analysis import choose, momentum_setting, recipe_max_lr
from fastimagenet.lr_finder.results import Sweeps, verdict
from fastimagenet.lr_finder.sweep import Ended, Sweep, SweepConfig, SweepRecord
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.recipes.digits import digits as digits_recipe
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.train import main as train_main
from fastimagenet.training.clock import Stopwatch
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split
from pipelines.errors import UserError
from pipelines.files import Row
from tests.commands import call, output_of

MODULE = "fastimagenet.lr_find"
SIZES = ["--set", "phases.*.image_size=8", "--set", "phases.*.eval_size=8"]
SHORT = ["--device", "cpu", "--num-it", 24, *SIZES]
ENDLESS = ["--device", "cpu", "--num-it", 100_000, "--end-lr", 2e-5, *SIZES]
"""The LR stays so low that nothing ends it but the user."""
sweep = partial(output_of, MODULE)


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "lr_find.json").read_text())
    return found


def rows_in(folder: Path) -> list[Row]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def pasted(out: str) -> list[str]:
    """The arguments that the command has told its user to type."""
    (line,) = (line for line in out.splitlines() if line.startswith("  --set "))
    return shlex.split(line)


def stop_at_rows(folder: Path, process: int, number: signal.Signals) -> None:
    """Send a signal once there are enough rows to draw."""
    deadline = time.monotonic() + 300
    while len(rows_in(folder)) < 25 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process, number)


def check_stopped(folder: Path) -> None:
    """What a stopped sweep has recorded is there, in rows, figures and page."""
    found, rows = found_in(folder), rows_in(folder)
    (entry,) = found["sweeps"]
    assert entry["ended"] == "stopped"
    assert entry["iterations"] == len(rows) >= 25
    assert (folder / "loss_against_lr.svg").exists()
    assert "<svg" in (folder / "lr_find.html").read_text()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of two finished sweeps, and what the command printed."""
    folder = tmp_path_factory.mktemp("sweeps")
    out, err = sweep(
        *(*SHORT, "--wd", "1e-1", "1e-4", "--momentum", "0.8"),
        *("--output", folder / "out", "--recipe-out", folder / "mine.toml", "--deterministic"),
    )
    assert err == ""
    return folder, out


def test_two_sweeps_leave_rows_figures_page_and_result(swept: tuple[Path, str]) -> None:
    folder, out = swept[0] / "out", swept[1]
    names = {path.name for path in folder.iterdir()}
    assert {"plan.json", "metrics.jsonl", "lr_find.json", "lr_find.html"} <= names
    assert {"loss_against_lr.png", "loss_against_lr.svg"} <= names
    found = found_in(folder)
    assert [sweep["weight_decay"] for sweep in found["sweeps"]] == [0.1, 0.0001]
    assert [sweep["momentum"] for sweep in found["sweeps"]] == [0.8, 0.8]
    assert (found["recipe"], found["world_size"], found["precision"]) == ("digits", 1, "fp32")
    assert "python -m fastimagenet.lr_find --device cpu" in found["command"]
    assert 0 < found["seconds"] < 600
    assert (found["deterministic"], found["threads"]) == (True, torch.get_num_threads())
    chosen = found["chosen"]
    best = found["sweeps"][chosen["index"]]
    assert chosen["suggestions"] == best["suggestions"]
    assert chosen["lr"] == best["suggestions"]["steepest"]
    assert found["max_lr"] == pytest.approx(chosen["lr"], rel=0.005)  # three digits
    assert "sweep 2 of 2: weight decay 0.0001, momentum 0.8: 24 iterations, up to lr 5.62" in out
    assert f", steepest {chosen['lr']:.3g}, " in out
    assert f"report: {folder / 'lr_find.html'}" in out


def test_every_sweep_starts_from_the_same_state(swept: tuple[Path, str]) -> None:
    rows = rows_in(swept[0] / "out")
    first, second = ([row for row in rows if row["sweep"] == index] for index in range(2))
    assert {row["kind"] for row in rows} == {"sweep"}
    assert [row["weight_decay"] for row in (first[0], second[0])] == [0.1, 0.0001]
    # The first batch is looked at before any update: the same images and weights give this.
    assert first[0]["loss"] == second[0]["loss"]
    assert [row["loss"] for row in first] != [row["loss"] for row in second]
    for row in rows:
        lr = 1e-5 * (10 / 1e-5) ** (row["iteration"] / 24)
        assert row["lr"] == pytest.approx(lr)
        assert row["momentum"] == 0.8
        assert {"val_loss", "top1", "top5"} <= set(row)


def test_the_recipe_and_the_flags_are_the_same_and_train_takes_both(
    swept: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = swept
    found = found_in(folder / "out")
    flags = pasted(out)
    assert flags[1] == f"max_lr={found['max_lr']}"
    assert flags[3].startswith("weight_decay=")
    assert flags[5] == "use_clr_beta=[10.0, 20.0, 0.95, 0.8]"
    assert train_main(["--print-recipe", *SIZES, *flags]) == 0
    assert capsys.readouterr().out == (folder / "mine.toml").read_text()
    train_main(["--dry-run", "--device", "cpu", "--recipe", str(folder / "mine.toml")])
    assert f"peak lr {found['max_lr']:.5g} " in capsys.readouterr().out
    _, err = sweep(*SHORT, "--recipe-out", folder / "mine.toml", status=2)
    assert "mine.toml exists and is left alone: name a new file" in err
    _, err = sweep(*SHORT, "--output", folder / "out", status=2)
    assert "holds another run" in err


def test_the_folder_is_read_back_and_lr_find2_gives_its_rows_bit_for_bit(
    swept: tuple[Path, str],
) -> None:
    folder, out = swept
    read = Sweeps.open(folder / "out")
    assert repr(read) in out
    chosen = found_in(folder / "out")["chosen"]
    assert read.suggestion is not None
    assert (read.suggestion.lr, list(read.suggestion.settings)) == (
        chosen["lr"],
        chosen["settings"],
    )
    recipe = recipe_toml.with_settings(digits_recipe(), SIZES[1::2])
    config = RunConfig(recipe=recipe, data=DataConfig())
    train, val = read_data(config.data, say_notes=False)
    plan = Plan.of(config.recipe, 1, len(train))
    val = runs.shuffled(val, config.seed)
    trainer = runs.build_trainer(config, plan, World(), train, val, Stopwatch())
    found = fastimagenet.lr_find2(trainer, num_it=24, wds=1e-4, momentum=0.8)
    trainer.train_loader.close()
    trainer.eval_loader.close()
    assert found == read.runs[1]


def test_sweeps_are_plotted_as_asked_for(swept: tuple[Path, str]) -> None:
    read = Sweeps.open(swept[0] / "out")
    best = read.runs[found_in(swept[0] / "out")["chosen"]["index"]]
    assert best.linear is False
    lengths = {len(line.get_xdata()) for line in read.plot().axes[0].lines}  # type: ignore[arg-type]
    assert lengths == {len(run.shown()) for run in read.runs}
    figure = read.plot(skip_first=2, skip_last=0, smoothed=False)
    assert figure._repr_svg_().startswith("<svg")  # type: ignore[attr-defined]
    losses, top1 = figure.axes[0].lines, figure.axes[2].lines
    assert len(losses) == len(top1) == 2  # no faint line beside the values themselves
    for line, run in zip(top1, read.runs, strict=True):
        wanted = [100 * record.top1 for record in run.records[2:]]
        assert list(line.get_ydata()) == pytest.approx(wanted)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="skip_last must be 0 or more, not -1"):
        read.plot(skip_last=-1)


def test_infinite_losses_are_read_back_as_nan(tmp_path: Path) -> None:
    """JSON has neither: they are null in the rows."""
    run = falling(4, 0, "not finite")
    row = {"kind": "sweep", "step": 0, "sweep": 0, **vars(run.records[0]), "loss": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    entry = {"weight_decay": 1e-4, "momentum": 0.9, "ended": "not finite"}
    summary = {"num_it": 4, "linear": False, "sweeps": [entry], "chosen": None}
    (tmp_path / "lr_find.json").write_text(json.dumps(summary))
    read = Sweeps.open(tmp_path)
    assert read.suggestion is None
    assert math.isnan(read.runs[0].records[0].loss)
    assert replace(read.runs[0].records[0], loss=2) == run.records[0]


def test_settings_give_the_flags_that_ask_for_the_same() -> None:
    settings = SweepConfig(
        start_lr=1e-4, num_it=7, weight_decays=(0.1, 1e-5), momenta=(0.5,), linear=True,
        stop_dv=False, recipe_out=Path("mine.toml"),
    )  # fmt: skip
    asked: list[SweepConfig] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "sweep", lambda _, settings, *__: (asked.append(settings), None))
        main(settings.flags())
        main(SweepConfig().flags())
    assert asked == [settings, SweepConfig()]


def test_ctrl_c_on_a_terminal_keeps_and_draws_what_there_is(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal of unknown size, as a fresh pseudo-terminal is: the bar is seen all the same."""
    ours, theirs = pty.openpty()
    text = bytearray()

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while part := os.read(ours, 65536):
                text.extend(part)

    stop = (tmp_path / "out", os.getpid(), signal.SIGINT)
    threads = [Thread(target=read), Thread(target=stop_at_rows, args=stop)]
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "__stdout__", terminal)
        for thread in threads:
            thread.start()
        assert call(MODULE, *ENDLESS, "--output", tmp_path / "out") == 130
    for thread in threads:
        thread.join()
    os.close(ours)
    check_stopped(tmp_path / "out")
    assert b"lr 1.00e-05, loss" in text
    assert b"/100000 [" in text
    assert str(tmp_path / "out" / "lr_find.html").encode() in text.replace(b"\r\n", b"")


def test_the_recipes_own_units(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A global batch of 64 where the recipe's LR is meant for 128: half of max_lr."""
    monkeypatch.setattr("fastimagenet.lr_finder.results.draw", lambda sweeps: {})
    out, err = sweep(*SHORT, "--output", tmp_path / "out", "--set", "lr_reference_batch=128")
    assert err == ""
    found = found_in(tmp_path / "out")
    assert found["max_lr"] == pytest.approx(2 * found["chosen"]["lr"], rel=0.005)
    assert pasted(out) == ["--set", f"max_lr={found['max_lr']}"]
    assert len(rows_in(tmp_path / "out")) == found["sweeps"][0]["iterations"]


def test_nothing_to_suggest_is_said_and_is_no_error(tmp_path: Path, digits: Path) -> None:
    recipe = tmp_path / "mine.toml"
    out, _ = sweep(
        *(*SHORT, "--start-lr", "1e30", "--end-lr", "1e31"),
        *("--output", tmp_path / "out", "--recipe-out", recipe),
    )
    assert "no learning rate can be suggested: the loss is not finite" in out
    assert f"--recipe-out {recipe} is not written: nothing was found" in out
    assert not recipe.exists()
    assert found_in(tmp_path / "out")["chosen"] is None
    assert (tmp_path / "out" / "lr_find.html").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start-lr", "0"], "--start-lr must be above 0"),
        (["--end-lr", "1e-6"], "--end-lr must be above --start-lr, 1e-05, not 1e-06"),
        (["--num-it", "0"], "--num-it must be at least 1"),
        (["--wd", "0.1", "-1"], "--wd must be 0 or more, not -1"),
        (["--momentum", "0.9", "1"], "--momentum must be in [0, 1), not 1"),
        (
            ["--recipe", "resnet"],
            "--recipe resnet is neither a recipe nor a .toml file: known are digits",
        ),
        (["--seed", "-1"], "--seed must be from 0 to 9223372036854775807"),
        (["--set", "use_clr_beta=[10, 10, 0.9]"], "use_clr_beta must be (div, pct) or"),
        (["--set", "phases.0.batch_size=400", "--set", "phases.1.batch_size=400"], "smaller than"),
        (["--recipe-out", "mine.txt"], "--recipe-out mine.txt must end with .toml"),
        (["--recipe-out", "none/mine.toml"], "there is no folder none"),
        (["--recipe-out", "folder.toml"], "--recipe-out folder.toml is a folder"),
        (["--output", "folder.toml/file"], "--output folder.toml/file is a file: name a folder"),
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_a_wrong_flag_is_one_line_and_nothing_written(
    flags: list[str],
    message: str,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)  # not that of the tests to come
    Path("folder.toml").mkdir()
    Path("folder.toml/file").touch()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert cli.exit_status(main, ["--device", "cpu", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.toml"]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


PHASES = (
    Phase(epochs=1, image_size=16, batch_size=64),
    Phase(epochs=1, image_size=24, batch_size=32),
)


def test_max_lr_is_in_the_recipes_units() -> None:
    """By hand: 64 images on each of 2 processes are a quarter of 512, and the spans peak at 2."""
    recipe = Recipe(
        name="spans",
        phases=PHASES,
        max_lr=0.8,
        lr_reference_batch=512,
        schedule="piecewise",
        lr_spans=((0, 0.5, 0.1, 1), (0.5, 1, 2, 0.5), (1, 2, 0.5, 0)),
    )
    plan = Plan.of(recipe, 2, 64 * 2 * 10)
    assert plan.lr(5) == pytest.approx(0.8 * 2 / 4)
    assert recipe_max_lr(plan, 0.3) == 0.6
    assert recipe_max_lr(plan, 0.12345) == 0.247
    assert (
        recipe_max_lr(Plan.of(recipe_toml.with_settings(recipe, ["max_lr=5"]), 2, 1280), 0.3) == 0.6
    )
    plain = Recipe(name="plain", phases=PHASES, max_lr=0.8)
    assert recipe_max_lr(Plan.of(plain, 2, 1280), 0.3) == 0.3


def test_the_peak_is_that_of_all_phases() -> None:
    """The later phase has twice the batch, and by the recipe's rule twice the LR."""
    phases = (PHASES[1], PHASES[0])
    spans = ((0.0, 1.0, 0.5, 1.0), (1.0, 2.0, 1.0, 0.0))
    recipe = Recipe(
        name="growing",
        phases=phases,
        lr_reference_batch=64,
        schedule="piecewise",
        lr_spans=spans,
    )
    assert recipe_max_lr(Plan.of(recipe, 2, 1280), 0.3) == 0.15


def falling(num_it: int, rising: int, ended: Ended) -> Sweep:
    """A loss that falls by 0.01 an iteration and rises in the last `rising` ones."""
    losses = [2 - 0.01 * i for i in range(num_it - rising)] + [3 + 0.01 * i for i in range(rising)]
    records = tuple(
        SweepRecord(
            iteration=i, lr=1e-5 * 1.1**i, momentum=0.9, loss=loss, val_loss=2, top1=0, top5=0
        )
        for i, loss in enumerate(losses)
    )
    return Sweep(
        weight_decay=1e-4,
        momentum=0.9,
        num_it=num_it,
        linear=False,
        records=records,
        ended=ended,
    )


def test_a_curve_that_still_falls_and_one_cut_short_say_so() -> None:
    plan = Plan.of(digits_recipe(), 1, 1438)

    def said(sweep: Sweep) -> str:
        return "\n".join(verdict([sweep], choose(plan, [sweep], SweepConfig())))

    assert "still falls where the sweep ends: a higher --end-lr" in said(falling(60, 0, "finished"))
    assert "still falls" not in said(falling(60, 20, "finished"))
    assert "best sweep: weight decay 0.0001" in said(falling(60, 20, "diverged"))
    assert "best sweep so far: " in said(falling(60, 20, "stopped"))
    assert "the sweep was stopped too early" in said(falling(60, 0, "stopped"))


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        (falling(4, 0, "finished"), "too few iterations: try a higher --num-it"),
        (falling(4, 0, "stopped"), "stopped too early"),
        (falling(4, 0, "not finite"), "not finite, or diverges, in the first iterations"),
        (falling(60, 60, "finished"), "the loss never fell"),
    ],
)
def test_why_nothing_is_suggested(sweep: Sweep, reason: str) -> None:
    plan = Plan.of(digits_recipe(), 1, 1438)
    assert choose(plan, [sweep], SweepConfig()) is None
    (line,) = verdict([sweep], None)
    assert line.startswith("no learning rate can be suggested: ")
    assert reason in line


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], "use_clr_beta=[10.0, 20.0, 0.95, 0.7]"),
        (["use_clr_beta=[10, 20, 0.6, 0.5]"], "use_clr_beta=[10.0, 20.0, 0.7, 0.7]"),
        (["use_clr_beta=[10, 20]"], "momentum=0.7"),
        (["schedule=one_cycle"], "one_cycle=[0.3, 25.0, 10000.0, 0.95, 0.7]"),
        (["schedule=piecewise", "lr_spans=[[0, 12, 1, 0]]"], "momentum=0.7"),
    ],
)
def test_the_momentum_is_set_where_the_schedule_takes_it_from(
    settings: list[str], expected: str
) -> None:
    recipe = digits_recipe()
    if settings:
        recipe = recipe_toml.with_settings(recipe, settings)
    setting = momentum_setting(recipe, 0.7)
    assert setting == expected
    plan = Plan.of(recipe_toml.with_settings(recipe, [setting]), 1, 64 * 20)
    peak = max(range(plan.total_steps), key=plan.lr)
    assert plan.momentum(peak) == pytest.approx(0.7, abs=0.005)


def test_validation_batches_hold_all_classes() -> None:
    """Folders are listed by class; a batch in that order would show one or two of them."""
    split = Split(
        whole_files(f"{i}.jpg" for i in range(100)),
        [i // 10 for i in range(100)],
        tuple("0123456789"),
    )
    mixed = runs.shuffled(split, seed=1)
    assert sorted(zip(mixed.files, mixed.labels, strict=True)) == sorted(
        zip(split.files, split.labels, strict=True)
    )
    assert len(set(mixed.labels[:50])) == 10
    assert mixed.files == runs.shuffled(split, seed=1).files != runs.shuffled(split, seed=2).files
