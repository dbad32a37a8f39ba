"""The data: from a folder of images to normalised batches on the device."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.backends import make_loader
    from pipelines.datasets.split import read_split
    from pipelines.loader import LoaderSpec

__all__ = ["LoaderSpec", "make_loader", "read_split"]

_HOMES = {
    "LoaderSpec": "pipelines.loader",
    "make_loader": "pipelines.backends",
    "read_split": "pipelines.datasets.split",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
