"""What timm, an extra, says of its networks: `model = "timm:NAME"`."""

from __future__ import annotations

from typing import Any

from fastimagenet.recipes.recipe import TIMM
from pipelines.errors import UserError, nearest


def normalisation(model: str) -> dict[str, tuple[float, ...]]:
    """Return the recipe's fields mean and std that the network `timm:NAME` was made for."""
    settings = settings_of(model)[1]
    return {name: tuple(map(float, settings[name])) for name in ("mean", "std")}


def settings_of(model: str) -> tuple[Any, dict[str, Any]]:
    """Return timm itself and its pretrained_cfg of a network.

    Raises UserError naming the recipe's field: with the nearest name, or without timm.
    """
    timm, name = _timm(), model.removeprefix(TIMM)
    if name.partition(".")[0] not in timm.list_models():
        close = nearest(name, timm.list_models())
        hint = f"did you mean {TIMM}{close}?" if close else "see timm.list_models()"
        raise UserError(f"recipe field model = '{TIMM}{name}': timm has no such network; {hint}")
    found = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return timm, {} if found is None else dict(found.to_dict())


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError(
            f"recipe field model: {TIMM}NAME takes the networks of timm: pip install "
            "'fastimagenet[timm]', or pip install timm"
        ) from None
    return timm
