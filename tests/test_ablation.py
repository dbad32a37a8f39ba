"""The ablation: which trainings it asks for, and its figures by hand."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest

from benchmarks.ablation.__main__ import main
from benchmarks.ablation.accuracies import accuracies_table, read_accuracies
from benchmarks.ablation.parts import variants
from benchmarks.common.matrix import Data, Matrix, Training
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes.plan import Plan
from pipelines.errors import UserError
from pipelines.files import read_object, write_object

SMALL = (
    *("--device", "cpu", "--recipe", "digits", "--epochs", "2", "--runs", "1"),
    *("--set", "tta=flip", "--only", "label_smoothing"),
)
"""Two runs of two epochs."""
FACTS = {
    "train_seconds": 80.0, "wall_seconds": 99.0, "recipe": "digits", "epochs": 9, "hardware": "h",
    "started": "2026-11-26T00:00", "precision": "fp32", "versions": {"torch": "t"},
}  # fmt: skip
"""Of a summary, whatever was trained."""


def test_the_command_writes_what_its_trainings_leave(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(matrix: Matrix) -> int:
        for one in matrix.trainings:
            one.folder.mkdir(parents=True)
            top1 = 0.9 - one.plan.recipe.label_smoothing  # 0.1 in the recipe
            summary = {"top1": top1, "tta_top1": top1} | FACTS
            (one.folder / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr(Matrix, "run", run)
    assert main(["--data", str(cifar10), "--output", str(tmp_path), *SMALL]) == 0
    whole, part = read_object(tmp_path / "ablation.json")["rows"]
    assert (whole["run"], part["run"]) == ("all", "label_smoothing")
    assert part["difference_points"]["mean"] == pytest.approx(10)
    text = (tmp_path / "table.md").read_text()
    assert "+10.00" in text and "by SGD" not in text and "Failed" not in text


class Diverging:
    """A stand-in for `subprocess.Popen` of a training: that of label smoothing fails, except in the
    longest run; SIGTERM comes in the last one, whose process then ends with 143."""

    def __init__(self, command: list[str], **_: object) -> None:
        self.words = command

    def wait(self) -> int:
        after = dict(zip(self.words, self.words[1:], strict=False))
        folder = Path(after["--output"])
        if folder.name == "label_smoothing-seed0" and after["--epochs"] != "6":
            return 1
        if folder.name == "optimizer-seed1":
            os.kill(os.getpid(), signal.SIGTERM)
            return 143
        folder.mkdir(parents=True)
        summary = FACTS | {
            "time_to_target_seconds": 40.0,
            "epochs": int(after["--epochs"]),
            "top1": 0.7,
            "tta_top1": 0.7,
            "time_split_seconds": {"data_wait": 4.0},
            "target": {"metric": "top1", "value": 0.7},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0

    def terminate(self) -> None:
        """It is never running when it could be asked to stop."""


def test_a_part_that_fails_or_a_stop_costs_no_result(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.common.matrix.subprocess", SimpleNamespace(Popen=Diverging))
    flags = ["--data", str(cifar10), "--recipe", "cifar10-speed", "--runs", "2", "--device", "cpu"]
    flags += ["--set", "phases.*.batch_size=50", "--only", "label_smoothing", "optimizer"]
    whole = [*flags, "--epochs", "4", "--output", str(tmp_path / "whole")]
    assert main([*whole, "--runs", "1"]) == 1
    lengths = [*flags, "--target", "top1=0.7", "--output", str(tmp_path / "times")]
    assert main([*lengths, "--lengths", "4", "6"]) == 128 + signal.SIGTERM
    failed = "Failed with an error: run label_smoothing, seed 0."
    for folder, name, runs in (
        ("whole", "ablation", ["all", "optimizer"]),
        ("times", "times", ["all", "optimizer", "label_smoothing"]),
    ):
        result = read_object(tmp_path / folder / f"{name}.json")
        assert [row["run"] for row in result["rows"]] == runs
        text = (tmp_path / folder / "table.md").read_text()
        assert failed in text and "optimizer: by SGD at the LR and decay that cifar10-airb" in text
    (all_seeds, one_seed, longer) = result["rows"]
    assert [row["seeds"] for row in result["rows"]] == [[0, 1], [0], [0, 1]]
    assert longer["runs"][0]["epochs"] == 6 and one_seed["seconds"]["values"] == [40.0]
    assert all_seeds["seconds"]["values"] == [40.0, 40.0]


def test_a_finished_run_that_was_read_or_computed_otherwise_is_refused(
    cifar10: Path, tmp_path: Path
) -> None:
    args = argparse.Namespace(
        data=cifar10, recipe="digits", set=[], epochs=2, only=["label_smoothing"], lengths=None,
        backend="memory", device="cpu",
    )  # fmt: skip
    (found,) = Matrix.of(variants(args, 500)[:1], [0], tmp_path, cifar10).trainings
    found.folder.mkdir()
    plan = found.plan.to_dict() | {"data": os.path.abspath(cifar10)}
    command = ["python", "-m", "fastimagenet.train", *found.flags]
    write_object(found.folder / "plan.json", plan)

    def again(**changes: object) -> None:
        other = argparse.Namespace(**vars(args) | changes)
        Matrix.of(variants(other, 500)[:1], [0], tmp_path, cifar10)

    again(backend="dali")  # what is not finished is resumed
    summary = {"command": shlex.join(command), "backend": "memory", "device": "cpu"}
    write_object(found.folder / "summary.json", summary)
    again()
    with pytest.raises(UserError, match=r"^--backend dali: --output .* with --backend memory: "):
        again(backend="dali")
    with pytest.raises(UserError, match=r"^--device cuda: --output .* with --device cpu: "):
        again(device="cuda")
    write_object(found.folder / "summary.json", summary | {"command": "-", "device": "cuda"})
    again(backend="memory", device="cuda")  # what "auto" has become
    write_object(found.folder / "plan.json", plan | {"accumulation": 2})
    with pytest.raises(UserError, match="holds a run with another --global-batch: give the"):
        again()
    del plan["accumulation"]  # as releases before this one wrote it
    write_object(found.folder / "plan.json", plan)
    again(backend="memory", device="cuda")


def test_the_figures_are_those_of_the_seeds(tmp_path: Path) -> None:
    plan = Plan.of(named_recipe("digits"), 1, 1000)
    top1 = {"all": (0.90, 0.92, 0.91), "whitening": (0.85, 0.88, 0.86)}
    trainings = []
    for seed in range(3):
        for run, values in top1.items():
            folder = tmp_path / f"{run}-{seed}"
            folder.mkdir()
            summary = FACTS | {"top1": values[seed], "tta_top1": values[seed] + 0.01}
            if (run, seed) != ("whitening", 2):  # not finished
                (folder / "summary.json").write_text(json.dumps(summary))
            trainings.append(Training(run=run, seed=seed, plan=plan, folder=folder, flags=[]))
    data = Data(name="d", dataset=None, train_images=1, val_images=1, suffixes={".jpg": 2})
    result = read_accuracies([one for one in trainings if one.finished], data, "-")
    whole, other = result["rows"]
    assert whole["tta_top1"]["mean"] == pytest.approx(fmean([0.91, 0.93, 0.92]))
    margin = 4.303 * stdev([0.91, 0.93, 0.92]) / math.sqrt(3)
    assert whole["tta_top1"]["high"] - whole["tta_top1"]["mean"] == pytest.approx(margin)
    assert other["seeds"] == [0, 1] and whole["difference_points"] is None
    assert other["difference_points"]["values"] == pytest.approx([-5.0, -4.0])
    text = accuracies_table(result)
    assert "| nothing      | 3 | 91.00 % (" in text and "| whitening    | 2 | 86.50 % (" in text
    assert "-4.50 (-10.85 .. +1.85)" in text


def test_a_part_is_trained_no_longer_than_it_needs(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {
        "all": {4: (None, 40.0), 6: (50.0, None)},
        "label_smoothing": {4: (None, None), 6: (100.0, 120.0)},
        "image_size": {4: (None, None), 6: (None, 70.0)},
        "loader": {4: (80.0, 80.0)},
    }
    asked = []

    def run(matrix: Matrix) -> int:
        for one in matrix.trainings:
            backend = "torchvision" if one.run == "loader" else "memory"
            assert one.flags[one.flags.index("--backend") + 1] == backend
            epochs = one.plan.epochs
            asked.append((epochs, one.run, one.seed))
            one.folder.mkdir(parents=True)
            summary = FACTS | {
                "time_to_target_seconds": times[one.run][epochs][one.seed],
                "epochs": epochs,
                "top1": 0.7,
                "time_split_seconds": {"data_wait": 4.0},
                "target": {"metric": "top1", "value": 0.7},
            }
            (one.folder / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr(Matrix, "run", run)
    flags = ["--data", str(cifar10), "--output", str(tmp_path), "--recipe", "digits", "--runs", "2"]
    flags += ["--only", "label_smoothing", "image_size", "loader", "--lengths", "6", "4"]
    assert main([*flags, "--target", "top1=0.7"]) == 0
    shorter = [(4, run, seed) for seed in (0, 1) for run in times]
    longer = [(6, run, seed) for seed in (0, 1) for run in times if run != "loader"]
    longer.remove((6, "all", 1))
    assert sorted(asked) == sorted(shorter + longer)
    whole, slower, missed, _ = read_object(tmp_path / "times.json")["rows"]
    assert whole["seconds"]["values"] == [50.0, 40.0] and whole["ratio"] is None
    assert slower["ratio"]["values"] == [2.0, 3.0]
    assert missed["seconds"] is None and missed["ratio"] is None
    text = (tmp_path / "table.md").read_text()
    assert "to 70.00 % top1" in text and "| missed" in text and "5.00 %" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "2"], "--epochs: --lengths has the numbers of epochs"),
        (["--lengths", "0"], "--lengths: must be at least 1, not 0"),
        (["--runs", "0"], "--runs: must be at least 1, not 0"),
        (["--only", "whitening"], "--only whitening: recipe digits does not use it"),
        (["--only", "loader"], "--only loader: it takes --lengths, and a --backend that is not"),
        (["--only", "colour"], "--only: invalid choice: 'colour'"),
        (
            ["--recipe", "digit"],
            "--recipe digit is neither a recipe nor a .toml file: did you mean digits?",
        ),
        (["--set", "max_lr=0"], "recipe field max_lr must be above 0"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: list[str], message: str, digits: Path, tmp_path: Path
) -> None:
    given = ["--data", str(digits), "--output", str(tmp_path / "out"), *SMALL, *flags]
    with pytest.raises(UserError) as error:
        main(given)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_every_part_of_the_speed_recipe_can_be_switched_off(
    cifar10: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Training] = []
    monkeypatch.setattr(Matrix, "run", lambda matrix: asked.extend(matrix.trainings))
    small = ["--set", "phases.0.batch_size=50", "--set", "phases.1.batch_size=50"]
    main(["--data", str(cifar10), "--output", str(tmp_path), "--runs", "2", *small])
    recipes = {training.run: training.plan.recipe for training in asked}
    assert [training.seed for training in asked] == [0] * len(recipes) + [1] * len(recipes)
    whole = recipes.pop("all")
    assert list(recipes) == [
        *("whitening", "dirac_init", "bias_lr_factor", "label_smoothing", "alternating_flip"),
        *("optimizer", "image_size", "precision"),
    ]
    assert {phase.image_size for phase in recipes["image_size"].phases} == {32}
    assert recipes["optimizer"].max_lr == pytest.approx(11.5 / 1024 / (1 + 1 / 0.15) * 50, rel=1e-3)
    assert all(recipe != whole and recipe.epochs == whole.epochs for recipe in recipes.values())
