"""Checkpoints: written beside and renamed, read without running any code from the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from fastimagenet.files import written_beside
from pipelines.errors import UserError


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values. Raises OSError, such as for a full disk."""
    import torch

    with written_beside(path) as beside, beside.open("wb") as file:
        torch.save(state, file)


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """What `save` wrote. Raises UserError naming the file if it is missing, damaged or hostile."""
    import torch

    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read, take another one: {reason}") from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"checkpoint {path} was not written by fastimagenet: it holds no model")
    return state
