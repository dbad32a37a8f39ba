"""Weights that a training starts from: torchvision's, timm's, or those of a file."""

from __future__ import annotations

import json
import pickle
import urllib.error
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fastimagenet.models.parts import head_of
from fastimagenet.models.timms import make_model
from fastimagenet.recipes.recipe import RESNETS, TIMM, Recipe
from fastimagenet.training import checkpoint
from pipelines.datasets.index import locked
from pipelines.errors import UserError

IMAGENET = "imagenet"
FILES = (".pt", ".pth", ".safetensors")
PREFIXES = ("module.", "_orig_mod.")
"""Of the names that DDP, an average of weights and torch.compile wrap a network in."""


def load_pretrained(model: nn.Module, recipe: Recipe, classes: Sequence[str]) -> str:
    """Copy the weights that the recipe's `pretrained` names into the model.

    A head of another shape stays as it was drawn, and so does one of a file of ours whose classes
    are others, even if as many. Of the processes of a node one downloads, the others wait for it.
    Returns a line for the user that says what was loaded. Raises UserError naming `pretrained` for
    any other difference, and where the weights cannot be had.
    """
    of_classes: Sequence[str] | None = None
    if recipe.pretrained.endswith(FILES):
        source = recipe.pretrained
        state, of_classes = read_weights(Path(source))
    elif recipe.model.startswith(TIMM):
        source, state = f"{recipe.model}, timm's", timms_weights(recipe, len(classes))
    else:
        source, state = torchvisions_weights(recipe)
    own, head = model.state_dict(), [*map(id, head_of(model).parameters())]
    in_head = [name for name, value in model.named_parameters() if id(value) in head]
    anew = [name for name in in_head if name not in state or state[name].shape != own[name].shape]
    if of_classes is not None and list(of_classes) != list(classes):
        anew = in_head
    for name in anew:
        state[name] = own[name]
    check_names(recipe.pretrained, own, state)
    model.load_state_dict(state, strict=False)
    about = f"; its head is drawn anew for {len(classes)} classes" if anew else ""
    return f"pretrained: starts from the weights of {source}{about}"


def check_names(pretrained: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise UserError for the first tensor that is missing, unknown or of another shape."""
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):
            continue
        there = tuple(state[name].shape) if name in state else "missing"
        if there != tuple(value.shape):
            raise UserError(
                f"recipe field pretrained = {pretrained!r} is of another network: {name} is "
                f"{there}, where the recipe's model has {tuple(value.shape)}"
            )
    unknown = next((name for name in state if name not in own), None)
    if unknown is not None:
        raise UserError(
            f"recipe field pretrained = {pretrained!r} is of another network: the recipe's model "
            f"has no {unknown}"
        )


def read_weights(path: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """Read the weights of a file: a checkpoint of ours, averaged where it averages, or others'.

    With them come the classes, where it was written here; None: not told.

    .safetensors holds tensors by name; .pt and .pth, too, or an entry "state_dict" or "model" of
    them. Raises UserError naming `pretrained`.
    """
    where = f"recipe field pretrained = {str(path)!r}"
    classes: list[str] | None = None
    try:
        if path.suffix == ".safetensors":
            safetensors = _safetensors(where)
            content = safetensors.load_file(path)
            with safetensors.safe_open(path, "pt") as file:
                facts = file.metadata() or {}
            if {"recipe", "classes"} <= facts.keys():  # written by fastimagenet.export
                classes = json.loads(facts["classes"])
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file") from None
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{where} cannot be read as weights: {reason}") from None
    except Exception as error:  # safetensors has an error of its own
        if type(error).__module__.partition(".")[0] != "safetensors":
            raise
        raise UserError(f"{where} cannot be read as weights: {error}") from None
    if isinstance(content, Mapping) and "model" in content and "ema" in content:
        return checkpoint.weights(dict(content)), content.get("classes") or None
    for entry in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{where} holds no weights by name")
    for prefix in PREFIXES:
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return dict(content), classes


def torchvisions_weights(recipe: Recipe) -> tuple[str, dict[str, Tensor]]:
    """Return name and tensors of torchvision's weights, from its cache or else downloaded.

    torchvision checks the file's hash. Raises UserError naming `pretrained`.
    """
    wanted, where = recipe.pretrained, f"recipe field pretrained = {recipe.pretrained!r}"
    if recipe.model not in RESNETS:
        raise UserError(
            f"{where}: there are none for model {recipe.model}: name a file of weights "
            f"({', '.join(FILES)}), or take one of {', '.join(RESNETS)}"
        )
    known: Any = torchvision.models.get_model_weights(recipe.model)
    name = wanted.rpartition(".")[2]
    if wanted == IMAGENET:
        weights = known.DEFAULT
    elif name in known.__members__:
        weights = known[name]
    else:
        raise UserError(
            f"{where} is neither {IMAGENET!r} nor one of {', '.join(known.__members__)} for "
            f"{recipe.model}, nor a file ending in {', '.join(FILES)}"
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    with locked(path):
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError, urllib.error.URLError) as error:
            reason = str(getattr(error, "reason", error))
            raise UserError(
                f"{where}: {path} is not there and cannot be had from {weights.url} ({reason}): "
                f"put it there, or {from_scratch(recipe)}"
            ) from None
    return f"{recipe.model} {weights.name}", dict(state)


def timms_weights(recipe: Recipe, num_classes: int) -> dict[str, Tensor]:
    """Return the tensors of timm's weights for its network, from its cache or else downloaded."""
    if recipe.pretrained != IMAGENET:
        raise UserError(
            f"recipe field pretrained = {recipe.pretrained!r} must be {IMAGENET!r} or a file for "
            f"model {recipe.model}; timm's other weights are named with the model, as in "
            "timm:resnet18.a1_in1k"
        )
    sizes = sorted({phase.image_size for phase in recipe.phases})
    try:
        return make_model(recipe.model, num_classes, sizes, pretrained=True).state_dict()
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"recipe field pretrained: timm has no weights for {recipe.model} here and cannot "
            f"fetch any ({reason}): {from_scratch(recipe)}"
        ) from None


def from_scratch(recipe: Recipe) -> str:
    """Say how to start from random weights."""
    if recipe.name == "photos":
        return "--recipe photos-scratch starts from random weights"
    return "--set pretrained= starts from random weights"


def _safetensors(where: str) -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError:
        raise UserError(f"{where} takes the package safetensors: pip install safetensors") from None
