"""The forms that a trained network is exported in: each is written, read back and tried."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastimagenet.classifier import Classifier
from fastimagenet.models import build_model
from fastimagenet.recipes import toml
from fastimagenet.recipes.recipe import OPTIONS, RESNETS, TIMM, Recipe
from pipelines.datasets.images import ImageFile
from pipelines.datasets.split import undecodable
from pipelines.errors import UserError
from pipelines.files import write_object

MAX_DIFFERENCE = 1e-3
"""Of a logit of the export from the network's own."""
FACTS = "facts.json"
"""The extra file of a .pt2 that says what `facts_of` does."""
Run = Callable[[Tensor], Tensor]
"""Images (B, 3, S, S) float32 -> logits (B, classes)."""


@dataclass(frozen=True)
class Form:
    """A form that a network is written in."""

    packages: tuple[str, ...]
    """What writing and running it needs beside torch."""
    write: Callable[[Classifier, nn.Module, Path], None]
    """Write the network to a new path; where `is_graph` it may hold the normalisation, too."""
    read: Callable[[Classifier, Path], Run]
    """Read it back as the programs do that it is meant for."""
    is_graph: bool = True
    """It has operations, and not the weights alone."""
    check: Callable[[Recipe], None] = lambda recipe: None
    """Raise UserError for a network that this form cannot hold."""


class Normalised(nn.Module):
    """A network that takes pixels in 0..1 and normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.model = network.model
        for name in ("mean", "std"):
            values = torch.tensor(getattr(network.recipe, name), dtype=torch.float32)
            self.register_buffer(name, values[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


def write_export(
    network: Classifier, out: Path, form: Form, files: Sequence[ImageFile], raw: bool
) -> float:
    """Write a network, run what was written on images, and put it at `out` if it does the same.

    `raw`: a graph takes normalised images. Returns the largest difference of a logit. Raises
    UserError where that is too large, and for an image that cannot be read.
    """
    inputs = torch.stack([read(network.preprocess, file) for file in files])
    taken, model = inputs, network.model
    if form.is_graph and not raw:
        plain = replace(network.preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        taken = torch.stack([read(plain, file) for file in files])
        model = Normalised(network).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as scratch:
        beside = Path(scratch) / out.name
        form.write(network, model, beside)
        run = form.read(network, beside)
        with torch.no_grad():
            # One image alone, too: the size of a batch must be free.
            found = torch.cat([run(part) for part in (taken[:1], taken[1:]) if len(part)])
            difference = float((found - network.model(inputs)).abs().max())
        if not difference <= MAX_DIFFERENCE:  # nor for NaN
            raise UserError(
                f"{out}: a logit of what was written is {difference:.2g} from the network's own, "
                f"which is more than {MAX_DIFFERENCE:g}: it was removed again"
            )
        if beside.is_dir() and out.is_dir():
            for file in beside.iterdir():
                file.replace(out / file.name)
        else:
            beside.replace(out)
    return difference


def read(preprocess: Callable[[Image.Image], Tensor], file: ImageFile) -> Tensor:
    """Preprocess an image of the data. Raises UserError naming it."""
    try:
        with file.open() as stream, Image.open(stream) as image:
            return preprocess(image)
    except Exception as error:
        raise undecodable(file, error) from error


def facts_of(network: Classifier, model: nn.Module | None = None) -> dict[str, str]:
    """Say, as texts by name, what has to be known to use the network."""
    recipe, stage = network.recipe, network.stage
    pixels = "pixels in 0..1" if isinstance(model, Normalised) else "(pixels in 0..1 - mean) / std"
    size = stage.image_size
    turned = "turned upright by their EXIF orientation, " if recipe.upright else ""
    return {
        "classes": json.dumps(network.classes),
        "model": recipe.model,
        "input": f"RGB images (batch, 3, {size}, {size}) float32, {pixels}: {turned}"
        f"the short side resized to {int(size * recipe.resize_ratio + 0.5)} px, bilinear, and the "
        "centre cut out",
        "mean": json.dumps(recipe.mean),
        "std": json.dumps(recipe.std),
        "recipe": toml.dumps(recipe),
    }


def exported(network: Classifier, model: nn.Module) -> torch.export.ExportedProgram:
    """Trace a network for batches of any size: "images" -> logits."""
    size = network.stage.image_size
    example = torch.zeros(2, 3, size, size)  # of one image torch would take the size for fixed
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def write_pt2(network: Classifier, model: nn.Module, path: Path) -> None:
    facts = json.dumps(facts_of(network, model), indent=2)
    torch.export.save(exported(network, model), path, extra_files={FACTS: facts})


def read_pt2(network: Classifier, path: Path) -> Run:
    return torch.export.load(path).module()


def write_onnx(network: Classifier, model: nn.Module, path: Path) -> None:
    program = torch.onnx.export(
        exported(network, model),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(facts_of(network, model))
    program.save(path, external_data=False)


def read_onnx(network: Classifier, path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_safetensors(network: Classifier, model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), path, metadata={"format": "pt"} | facts_of(network))


def read_safetensors(network: Classifier, path: Path) -> Run:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}
    model = build_model(toml.loads(facts["recipe"], str(path)), len(json.loads(facts["classes"])))
    model.load_state_dict(weights)
    return model.eval()


def write_folder(network: Classifier, model: nn.Module, path: Path) -> None:
    """Write config.json and model.safetensors: torchvision's ResNets are timm's, name by name."""
    path.mkdir()
    write_safetensors(network, model, path / "model.safetensors")
    recipe, size = network.recipe, network.stage.image_size
    layers = {"first_conv": "conv1", "classifier": "fc"}  # of a ResNet
    told = getattr(model, "pretrained_cfg", layers)  # of a network of timm's own
    num_classes = len(network.classes)
    settings: dict[str, Any] = {
        "num_classes": num_classes,
        "input_size": [3, size, size],
        "mean": recipe.mean,
        "std": recipe.std,
        "interpolation": "bilinear",
        "crop_mode": "center",
        "crop_pct": 1 / recipe.resize_ratio,
    }
    config = {
        "architecture": recipe.model.removeprefix(TIMM).partition(".")[0],
        "num_classes": num_classes,
        "label_names": list(network.classes),
        "pretrained_cfg": settings | {name: told[name] for name in layers if told.get(name)},
    }
    write_object(path / "config.json", config)


def read_folder(network: Classifier, path: Path) -> Run:
    import timm

    model: nn.Module = timm.create_model(f"local-dir:{path}", pretrained=True)
    return model.eval()


def check_timm_has(recipe: Recipe) -> None:
    """Raise UserError unless timm has the recipe's network."""
    others = "name OUT.onnx, OUT.pt2 or OUT.safetensors instead"
    if recipe.model not in RESNETS and not recipe.model.startswith(TIMM):
        raise UserError(f"a folder is for timm, which has no {recipe.model}: {others}")
    for option in OPTIONS:
        if getattr(recipe, option):
            raise UserError(f"a folder is for timm, whose {recipe.model} has no {option}: {others}")


FORMS = {
    ".onnx": Form(("onnx", "onnxruntime", "onnxscript"), write_onnx, read_onnx),
    ".pt2": Form((), write_pt2, read_pt2),
    ".safetensors": Form(("safetensors",), write_safetensors, read_safetensors, is_graph=False),
    "": Form(("safetensors", "timm"), write_folder, read_folder, False, check_timm_has),
}
"""By how OUT ends; "" is a folder."""


def form_of(out: str) -> Form:
    """Choose the form by the name of OUT. Raises UserError for others, and for what is missing."""
    is_folder = Path(out).is_dir()
    suffix = "" if is_folder or out.endswith("/") else Path(out).suffix
    if suffix not in FORMS:
        raise UserError(f"OUT must end in {', '.join(filter(None, FORMS))} or /, not {suffix}")
    if is_folder and Path(out).suffix in FORMS and Path(out).suffix:
        raise UserError(f"{out} is a folder: name a file that is not there yet")
    missing = [name for name in FORMS[suffix].packages if find_spec(name) is None]
    if missing:
        pip = f"pip install {shlex.quote('fastimagenet[export]')}"
        raise UserError(f"{out} needs {', '.join(missing)}: {pip}")
    return FORMS[suffix]
