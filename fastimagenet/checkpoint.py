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

    try:
        with written_beside(path) as beside, beside.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # torch's zip writer, closing a file that is already short, hides why it is.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load(path: Path, *entries: str) -> dict[str, Any]:
    """What `save` wrote, on the CPU; it holds at least `entries`.

    Raises UserError naming the file if it is missing, damaged, hostile or of another program.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read, take another one: {reason}") from None
    missing = [name for name in entries if not isinstance(state, dict) or name not in state]
    if missing:
        raise UserError(
            f"checkpoint {path} was not written by fastimagenet.train: it has no {missing[0]}"
        )
    return dict(state)
