"""Exports: run by the programs that they are for, over the whole validation set."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import fastimagenet
from fastimagenet import forms
from fastimagenet.classifier import Classifier
from fastimagenet.models import build_model
from fastimagenet.recipes import toml
from fastimagenet.training import checkpoint
from pipelines.datasets.split import read_split
from tests.commands import evaluate, output_of


def export(*arguments: object, status: int = 0) -> tuple[str, str]:
    return output_of("fastimagenet.export", *arguments, status=status)


@pytest.fixture(scope="module")
def classifier(finished: Path) -> Classifier:
    return fastimagenet.load(finished)


@pytest.fixture(scope="module")
def top1(finished: Path, cifar10: Path) -> float:
    """As evaluate counts it, on the pixels that Pillow decodes."""
    flags = ("--data", cifar10, "--device", "cpu", "--backend", "torchvision", "--json")
    counted: float = json.loads(evaluate(finished, *flags)[0])["top1"]
    return counted


def with_onnxruntime(path: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    (images,) = session.get_inputs()
    assert images.name == "images" and isinstance(images.shape[0], str)
    facts = session.get_modelmeta().custom_metadata_map
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), facts


def with_torch(path: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    extra = {forms.FACTS: ""}
    model = torch.export.load(path, extra_files=extra).module()
    return model, json.loads(extra[forms.FACTS])


@pytest.mark.parametrize(
    ("suffix", "program", "raw"),
    [(".onnx", with_onnxruntime, False), (".pt2", with_torch, False), (".pt2", with_torch, True)],
)
def test_a_graph_gives_evaluates_top1_to_the_image(
    suffix: str, program: Callable, raw: bool, finished: Path, classifier: Classifier,
    top1: float, cifar10: Path, tmp_path: Path,
) -> None:  # fmt: skip
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"net{suffix}"
    said, _ = export(finished, out, *(["--raw"] if raw else []))
    assert said.startswith(f"{out}: epoch 3 of 3; on 29 validation images no logit is farther ")
    assert float(said.rpartition(" ")[2]) < 1e-4
    assert os.listdir(tmp_path) == [out.name]
    run, facts = program(out)
    assert tuple(json.loads(facts["classes"])) == classifier.classes
    assert ("(pixels in 0..1 - mean) / std" in facts["input"]) is raw
    preprocess = classifier.preprocess
    if not raw:
        preprocess = replace(preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    val = read_split(cifar10, "val")
    inputs = torch.stack([preprocess(Image.open(file.path)) for file in val.files])
    predicted = torch.cat([run(part) for part in inputs.split(67)]).argmax(dim=1)
    assert (predicted.numpy() == val.labels).sum() == 200 * top1


def test_weights_alone(finished: Path, classifier: Classifier, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    export(finished, tmp_path / "net.safetensors")
    with safetensors.safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(classifier.classes)
        for name, value in classifier.model.state_dict().items():
            assert torch.equal(file.get_tensor(name), value)
    _, err = export(finished, tmp_path / "net.safetensors", "--raw", status=2)
    assert err.startswith("error: --raw is for .onnx and .pt2: ") and err.count("\n") == 1


def checkpoint_of(finished: Path, folder: Path, model: str, **fields: object) -> Path:
    """A checkpoint of a network that was not trained, with averaged weights."""
    state = checkpoint.load(finished / "checkpoints" / "best.pt")
    recipe = replace(toml.loads(state["recipe"], ""), model=model, **fields)
    torch.manual_seed(0)
    last, average = (build_model(recipe, 10).state_dict() for _ in range(2))
    ema = {f"module.{name}": value for name, value in average.items()}
    path = folder / "network.pt"
    checkpoint.save(path, state | {"recipe": toml.dumps(recipe), "model": last, "ema": ema})
    return path


@pytest.mark.parametrize("model", ["resnet18", "timm:test_resnet.r160_in1k"])
def test_timm_loads_a_folder(model: str, finished: Path, cifar10: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    path = checkpoint_of(finished, tmp_path, model, zero_init_last_gamma=False)
    out = tmp_path / "hub" / "net.v1"
    said, _ = export(path, f"{out}/", "--data", cifar10)
    assert float(said.rpartition(" ")[2]) < 1e-3
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    made = timm.create_model(f"local-dir:{out}", pretrained=True)
    network = fastimagenet.load(path)
    for name, value in network.model.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
    config = timm.data.resolve_model_data_config(made)
    assert tuple(config["input_size"]) == (3, 16, 16) and config["crop_pct"] == 1.0
    for name in ("mean", "std"):
        assert tuple(config[name]) == getattr(network.recipe, name)
    assert json.loads((out / "config.json").read_text())["label_names"] == list(network.classes)


def test_a_folder_that_is_there_gets_the_new_files(
    finished: Path, cifar10: Path, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    path = checkpoint_of(finished, tmp_path, "timm:test_resnet.r160_in1k")
    (tmp_path / "hub").mkdir()
    for name in ("README.md", "config.json"):
        (tmp_path / "hub" / name).write_text("{}")
    export(path, tmp_path / "hub", "--data", cifar10)
    assert (tmp_path / "hub" / "README.md").read_text() == "{}"
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["architecture"] == "test_resnet"


def test_timm_lacks_networks(finished: Path, cifar10: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    _, err = export(finished, tmp_path / "hub", status=2)
    assert err == (
        "error: a folder is for timm, which has no smallnet: name OUT.onnx, OUT.pt2 or "
        "OUT.safetensors instead\n"
    )
    path = checkpoint_of(finished, tmp_path, "resnet18", blur_pool=True)
    _, err = export(path, tmp_path / "hub", "--data", cifar10, status=2)
    assert "whose resnet18 has no blur_pool: name OUT.onnx" in err
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_what_differs_is_not_kept(
    wrong: float, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    form = forms.FORMS[".safetensors"]

    def read(network: Classifier, path: Path) -> forms.Run:
        run = form.read(network, path)
        return lambda images: run(images) + wrong

    monkeypatch.setitem(forms.FORMS, ".safetensors", replace(form, read=read))
    out = tmp_path / "net.safetensors"
    out.write_text("the one before")
    _, err = export(finished, out, status=2)
    assert err == (
        f"error: {out}: a logit of what was written is {wrong:.2g} from the network's own, which "
        "is more than 0.001: it was removed again\n"
    )
    assert os.listdir(tmp_path) == [out.name] and out.read_text() == "the one before"


def test_mistakes_are_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = export(finished, tmp_path / "net.pth", status=2)
    assert err == "error: OUT must end in .onnx, .pt2, .safetensors or /, not .pth\n"
    (tmp_path / "net.onnx").mkdir()
    _, err = export(finished, tmp_path / "net.onnx", status=2)
    assert err.startswith(f"error: {tmp_path}/net.onnx is a folder: name a file")
    monkeypatch.setattr(forms, "find_spec", lambda name: None)
    _, err = export(finished, tmp_path / "other.onnx", status=2)
    assert err == (
        f"error: {tmp_path}/other.onnx needs onnx, onnxruntime, onnxscript: pip install "
        "'fastimagenet[export]'\n"
    )
