"""Networks of timm as recipes name them."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastimagenet.models import build_model
from fastimagenet.models.parts import layer_groups, parts
from fastimagenet.recipes import named_recipe, toml
from fastimagenet.recipes.recipe import Phase, Recipe
from pipelines.errors import UserError
from tests.commands import SMALL, error_of, evaluate, train

NAME = "timm:resnet10t"
RECIPE = Recipe(name="t", phases=(Phase(epochs=1, image_size=32, batch_size=2),), model=NAME)

if find_spec("timm") is None:  # importing it takes seconds
    pytest.skip("needs timm", allow_module_level=True)


def test_it_is_built_with_our_classes_and_its_own_groups() -> None:
    import timm

    model = build_model(RECIPE, 7)
    assert type(model) is type(timm.create_model("resnet10t"))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert len(parts(model)) == 6
    groups = layer_groups(model, 3)
    assert {groups[p] for p in model.get_classifier().parameters()} == {2}
    assert {groups[p] for p in model.layer3.parameters()} == {1}
    assert groups.keys() == set(model.parameters())


def test_mean_and_std_are_its_own_unless_given() -> None:
    digits = named_recipe("digits")
    of_inception = {"model": "timm:vit_tiny_patch16_224"}
    assert toml.with_settings(digits, of_inception).mean == (0.5, 0.5, 0.5)
    given = toml.with_settings(digits, of_inception | {"mean": [0.1, 0.2, 0.3]})
    assert given.mean == (0.1, 0.2, 0.3) and given.std == digits.std
    assert toml.loads(toml.dumps(given)) == given  # in a file they are given
    assert toml.with_settings(given, {"max_lr": 2.0}) == replace(given, max_lr=2.0)


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(recipe: Recipe) -> str:
        with pytest.raises(UserError, match=r"^recipe field model") as caught:
            build_model(recipe, 7)
        return str(caught.value)

    assert "did you mean timm:resnet50?" in message(replace(RECIPE, model="timm:resnet_50"))
    assert "see timm.list_models()" in message(replace(RECIPE, model="timm:?"))
    vit = replace(RECIPE, model="timm:vit_tiny_patch16_224")
    assert "takes images of 224 px only: --set phases.*.image_size=224" in message(vit)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in message(RECIPE)


def test_a_run_with_its_weights_absent_is_told_and_one_without_runs(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    phases = "phases=[{epochs = 1, image_size = 16, batch_size = 100}]"
    flags = [*SMALL, "--data", cifar10, "--set", f"model={NAME}", "--set", phases]
    told = error_of(*flags, "--set", "pretrained=imagenet", "--output", tmp_path / "a")
    assert "pretrained: timm has no weights for timm:resnet10t here and cannot fetch any" in told
    told = error_of(*flags, "--set", "pretrained=a1_in1k", "--output", tmp_path / "b")
    assert "must be 'imagenet' or a file" in told
    train(*flags, "--output", tmp_path / "run")
    out, _ = evaluate(tmp_path / "run")
    assert "top-1" in out
