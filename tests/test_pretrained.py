"""A training starts from given weights, and says so; nothing else ever fetches them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.training import checkpoint
from fastimagenet.training.pretrained import load_pretrained
from pipelines.errors import UserError
from tests.commands import SMALL, error_of, evaluate, train
from tests.networks import make_model

RECIPE = Recipe(
    name="test",
    phases=(Phase(epochs=1, image_size=32, batch_size=2),),
    model="resnet18",
    pretrained="imagenet",
)
FILE = "resnet18-f37072fd.pth"
"""As torchvision's cache has IMAGENET1K_V1."""


def drawn(seed: int, classes: int = 1000, name: str = "resnet18", **options: bool) -> nn.Module:
    torch.manual_seed(seed)
    return make_model(name, classes, **options)


def small(seed: int, classes: int) -> nn.Module:
    return drawn(seed, classes, "smallnet")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache of weights, empty, and no way to the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


TEN = [*map(str, range(10))]


def same_but_head(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("fc.")
    )


@pytest.mark.parametrize("wanted", ["imagenet", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_torchvisions_weights_come_from_its_cache(hub: Path, wanted: str) -> None:
    theirs = drawn(1)
    torch.save(theirs.state_dict(), hub / FILE)
    ours = drawn(2, 10, blur_pool=True)
    head = ours.fc.weight.detach().clone()
    line = load_pretrained(ours, replace(RECIPE, pretrained=wanted, blur_pool=True), TEN)
    assert "resnet18 IMAGENET1K_V1; its head is drawn anew for 10 classes" in line
    assert same_but_head(ours, theirs) and torch.equal(ours.fc.weight, head)


def test_a_head_of_the_same_shape_is_taken_too(hub: Path) -> None:
    theirs, ours = drawn(1), drawn(2)
    torch.save(theirs.state_dict(), hub / FILE)
    line = load_pretrained(ours, RECIPE, [*map(str, range(1000))])
    assert "anew" not in line and torch.equal(ours.fc.weight, theirs.fc.weight)


def test_without_a_network_one_line_says_where_the_file_would_be(hub: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained(drawn(1, 10), RECIPE, TEN)
    message = str(caught.value)
    assert message.startswith(f"recipe field pretrained = 'imagenet': {hub / FILE} is not there")
    assert "put it there" in message and "\n" not in message


@pytest.mark.parametrize("kind", ["plain", "DDP", "state_dict", "safetensors"])
def test_files_of_weights_are_read(tmp_path: Path, kind: str) -> None:
    theirs, ours = small(1, 5), small(2, 10)
    state = theirs.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        prefix = "module." if kind == "DDP" else ""
        state = {prefix + name: value for name, value in state.items()}
        torch.save({"state_dict": state, "epoch": 3} if kind == "state_dict" else state, path)
    load_pretrained(ours, replace(RECIPE, pretrained=str(path)), TEN)
    assert same_but_head(ours, theirs)


@pytest.mark.parametrize("averaged", [False, True])
def test_of_our_checkpoints_the_weights_that_are_evaluated(tmp_path: Path, averaged: bool) -> None:
    theirs, average, ours = small(1, 5), small(3, 5), small(2, 10)
    ema = {"module." + name: value for name, value in average.state_dict().items()}
    ema["n_averaged"] = torch.tensor(4)
    path = tmp_path / "best.pt"
    checkpoint.save(path, {"model": theirs.state_dict(), "ema": ema if averaged else None})
    load_pretrained(ours, replace(RECIPE, pretrained=str(path)), TEN)
    assert same_but_head(ours, average if averaged else theirs)


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors"])
def test_the_head_of_as_many_other_classes_is_drawn_anew(tmp_path: Path, kind: str) -> None:
    theirs = small(1, 10)
    for classes, taken in ((TEN, True), ([*TEN[1:], "10"], False)):
        ours = small(2, 10)
        if kind == "checkpoint":
            path = tmp_path / "best.pt"
            checkpoint.save(path, {"model": theirs.state_dict(), "ema": None, "classes": classes})
        else:
            path = tmp_path / "w.safetensors"
            facts = {"recipe": "", "classes": json.dumps(classes)}
            save_file = pytest.importorskip("safetensors.torch").save_file
            save_file(theirs.state_dict(), path, facts)
        line = load_pretrained(ours, replace(RECIPE, pretrained=str(path)), TEN)
        assert torch.equal(ours.fc.weight, theirs.fc.weight) is taken
        assert ("anew for 10 classes" in line) is not taken and same_but_head(ours, theirs)


def test_any_other_difference_is_one_line(hub: Path, tmp_path: Path) -> None:
    torch.save(drawn(1).state_dict(), hub / FILE)
    path = tmp_path / "w.pth"

    def message(recipe: Recipe, model: nn.Module) -> str:
        with pytest.raises(UserError, match=r"^recipe field pretrained") as caught:
            load_pretrained(model, recipe, TEN)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    other = drawn(2, 10, small_stem=True)
    assert "conv1.weight is (64, 3, 7, 7), where" in message(RECIPE, other)
    assert "neither 'imagenet' nor one of IMAGENET1K_V1" in message(
        replace(RECIPE, pretrained="imagenet22k"), drawn(2, 10)
    )
    recipe = replace(RECIPE, pretrained=str(path))
    assert "no such file" in message(recipe, small(2, 10))
    path.write_bytes(b"no weights")
    assert "cannot be read as weights" in message(recipe, small(2, 10))
    torch.save([1, 2], path)
    assert "holds no weights by name" in message(recipe, small(2, 10))
    torch.save({**small(1, 10).state_dict(), "more.weight": torch.ones(1)}, path)
    assert "has no more.weight" in message(recipe, small(2, 10))
    safe = tmp_path / "w.safetensors"
    safe.write_bytes(b"no weights either")
    assert "cannot be read" in message(replace(RECIPE, pretrained=str(safe)), small(2, 10))
    speed = replace(RECIPE, model="smallnet")
    assert "there are none for model smallnet" in message(speed, small(2, 10))


def test_a_run_starts_from_them_and_is_known_by_it(
    finished: Path, cifar10: Path, tmp_path: Path
) -> None:
    """Stopped and resumed, and evaluated, without the file."""
    weights, output = tmp_path / "other.pt", tmp_path / "run"
    shutil.copy(finished / "checkpoints" / "best.pt", weights)
    flags = [*SMALL, "--data", cifar10, "--set", f"pretrained={weights}", "--output", output]
    flags += ["--set", "layer_lrs=[0.1, 1.0]", "--set", "frozen_epochs=3"]
    out, _ = train(*flags)
    assert f"pretrained: starts from the weights of {weights}\n" in out
    assert "starts from pretrained weights" in out  # the plan
    weights.unlink()
    plan = json.loads((output / "plan.json").read_text())
    assert plan["recipe"]["pretrained"] == str(weights)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["pretrained"] == str(weights)
    (entry,) = (output / "dawnbench").glob("*.json")
    assert json.loads(entry.read_text())["misc"]["pretrained"] == str(weights)
    assert "pretrained" in (output / "report.html").read_text()
    out, _ = train(*flags, "--resume", "auto")
    assert "is finished" in out
    evaluate(output)
    # The head alone learned: the other layers are those of the file.
    before = checkpoint.load(finished / "checkpoints" / "best.pt")["model"]
    after = checkpoint.load(output / "checkpoints" / "last.pt")["model"]
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert "fc.weight" in changed
    assert not any(name.endswith("weight") for name in changed - {"fc.weight"})
    again = [*flags, "--output", tmp_path / "other"]
    assert "no such file" in error_of(*again)
