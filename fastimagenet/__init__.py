"""From a folder of JPEGs to a trained image classifier: DALI, 1cycle, progressive resizing, DDP.

Importing the package is cheap: torch and DALI are imported when a public name needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastimagenet.lr_finder.finder import lr_find2

__all__ = ["lr_find2"]
__version__ = "0.1.0"

_HOMES = {"lr_find2": "fastimagenet.lr_finder.finder"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastimagenet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
