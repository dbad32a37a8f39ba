"""Learning-rate sweeps, and what is read off them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastimagenet.lr_finder.finder import lr_find2

__all__ = ["lr_find2"]


def __getattr__(name: str) -> Any:
    """Import `lr_find2`, and with it torch, when it is first used."""
    if name != "lr_find2":
        raise AttributeError(f"module 'fastimagenet.lr_finder' has no attribute {name!r}")
    from fastimagenet.lr_finder.finder import lr_find2

    return lr_find2
