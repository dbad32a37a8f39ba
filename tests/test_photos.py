"""The recipe that a folder of one's own gets, and how it is fitted to the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastimagenet.config import DataConfig, RunConfig, chosen_recipe
from fastimagenet.distributed.world import Launch
from fastimagenet.recipes.photos import fitted, photos, photos_scratch
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.report.run import Run
from pipelines.datasets.known import CIFAR10_CLASSES
from tests.commands import summary_of, train


def folder_of(root: Path, classes: Sequence[str], counts: Sequence[int], side: int = 40) -> Path:
    rng = np.random.default_rng(3)
    for split in ("train", "val"):
        for name, count in zip(classes, counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for index in range(count if split == "train" else 2):
                pixels = rng.integers(0, 255, (side, side + 10, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.jpg")
    return root


def sizes(recipe: Recipe) -> list[tuple[int, int]]:
    return [(phase.image_size, phase.eval_size) for phase in recipe.phases]


def test_batch_epochs_and_sizes_fit_the_folder() -> None:
    large = fitted(photos(), 20_000, 500)
    assert (large.phases[0].batch_size, large.epochs) == (32, 10)
    assert sizes(large) == [(128, 160), (176, 224)]
    small = fitted(photos(), 100, 500)
    assert (small.phases[0].batch_size, small.epochs) == (8, 60) and small.frozen_epochs == 1
    assert 100 // small.phases[0].batch_size >= 12
    assert fitted(photos(), 5, 500).phases[0].batch_size == 2
    assert fitted(photos(), 1000, 500, processes=4).phases[0].batch_size == 16
    scratch = fitted(photos_scratch(), 2000, 500)
    assert scratch.epochs == 30 and not scratch.pretrained and not scratch.layer_lrs
    assert sizes(fitted(photos(), 1000, 160)) == [(112, 144), (160, 160)]
    assert sizes(fitted(photos(), 1000, 32)) == [(32, 32), (32, 32)]
    assert sizes(fitted(photos(), 1000, 20)) == [(32, 32), (32, 32)]


def test_the_recipe_without_a_name_is_that_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen_recipe(None)[0].name == "digits"
    cifar = DataConfig(folder=folder_of(tmp_path / "c", CIFAR10_CLASSES, [1] * 10))
    assert chosen_recipe(None, cifar)[0].name == "cifar10"
    mine = DataConfig(folder=folder_of(tmp_path / "m", ("cat", "dog"), (30, 18)))
    recipe, (note,) = chosen_recipe(None, mine)
    assert recipe.name == "photos" and not recipe.target and recipe.pretrained == "imagenet"
    assert note == (
        "note: recipe photos for 2 classes that are neither ImageNet's nor CIFAR-10's, fitted to "
        "48 training images, most with a short side of 40 px or more: batch 4, 60 epochs at 32 px"
    )
    assert chosen_recipe("digits", mine) == (chosen_recipe("digits")[0], ())
    assert chosen_recipe("photos-scratch", mine)[0].phases[0].batch_size == 4
    monkeypatch.setattr("fastimagenet.config.gpu_count", lambda: 2)  # a process on each
    assert chosen_recipe("photos", mine, Launch())[0].phases[0].batch_size == 2
    assert chosen_recipe("photos", mine, Launch(device="cpu"))[0].phases[0].batch_size == 4


def test_the_flags_of_a_fitted_recipe_ask_for_the_same(tmp_path: Path) -> None:
    """Also where the user has set what the unfitted recipe has."""
    data = DataConfig(folder=folder_of(tmp_path, ("cat", "dog"), (12, 12)))
    recipe, _ = chosen_recipe("photos", data)
    for asked in (recipe, replace(recipe, phases=photos().phases)):
        flags = RunConfig(recipe=asked, data=data).flags()
        from fastimagenet import cli
        from fastimagenet.train import parser

        assert cli.run_config(parser().parse_args(flags)).recipe == asked


def test_a_folder_of_photographs_is_trained_by_its_name_alone(tmp_path: Path) -> None:
    """Without a network, from scratch; unbalanced, and said so."""
    data = folder_of(tmp_path / "mine", ("cat", "dog"), (40, 4))
    _, err = train(
        *("--data", data, "--recipe", "photos-scratch", "--set", "model=smallnet"),
        *(
            "--device",
            "cpu",
            "--epochs",
            2,
            "--set",
            "class_weight_power=1",
            "--output",
            tmp_path / "run",
        ),
    )
    assert "note: recipe photos-scratch, fitted to 44 training images" in err
    assert "unbalanced: 40 training images of cat, 4 of dog; --set class_weight_power" in err
    notes = json.loads((tmp_path / "run" / "plan.json").read_text())["notes"]
    assert any("fitted to 44" in note for note in notes) and any("unbalanced" in n for n in notes)
    summary = summary_of(tmp_path / "run")
    assert summary["target"] is None and summary["top5"] is None
    page = (tmp_path / "run" / "report.html").read_text()
    assert Run.open(tmp_path / "run").target is None and "The target of" not in page
    shutil.rmtree(data / "train" / "dog")
    with pytest.raises(AssertionError, match="status 2"):
        train("--data", data, "--dry-run")
