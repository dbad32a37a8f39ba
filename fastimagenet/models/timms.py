"""Networks of timm, an extra: `model = "timm:NAME"`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastimagenet.recipes.recipe import TIMM
from pipelines.errors import UserError, nearest


def make_model(
    model: str, num_classes: int, image_sizes: Sequence[int], *, pretrained: bool = False
) -> nn.Module:
    """Make the network `timm:NAME`. Raises UserError naming the recipe's field.

    image_sizes: those that it will get. Its head has `num_classes` outputs, also with timm's
    `pretrained` weights, which timm downloads.
    """
    timm, name = _timm(), model.removeprefix(TIMM)
    settings = _settings(timm, name)
    if settings.get("fixed_input_size"):
        side = settings["input_size"][-1]
        if any(size != side for size in image_sizes):
            raise UserError(
                f"recipe field model = {model!r} takes images of {side} px only: "
                f"--set phases.*.image_size={side} --set phases.*.eval_size={side}"
            )
    made: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    return made


def normalisation(model: str) -> dict[str, tuple[float, ...]]:
    """Return the recipe's fields mean and std that the network `timm:NAME` was made for."""
    settings = _settings(_timm(), model.removeprefix(TIMM))
    return {name: tuple(map(float, settings[name])) for name in ("mean", "std")}


def _settings(timm: Any, name: str) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a network. Raises UserError with the nearest name."""
    if name.partition(".")[0] not in timm.list_models():
        close = nearest(name, timm.list_models())
        hint = f"did you mean {TIMM}{close}?" if close else "see timm.list_models()"
        raise UserError(f"recipe field model = '{TIMM}{name}': timm has no such network; {hint}")
    found = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return {} if found is None else dict(found.to_dict())


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError(
            f"recipe field model: {TIMM}NAME takes the networks of timm: pip install "
            "'fastimagenet[timm]', or pip install timm"
        ) from None
    return timm
