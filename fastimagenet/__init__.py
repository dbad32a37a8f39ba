"""From a folder of JPEGs to a trained image classifier: DALI, 1cycle, progressive resizing, DDP.

Importing the package is cheap: torch and DALI are imported when a public name needs them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastimagenet.api import loader, lr_find, recipe, train
    from fastimagenet.classifier import Classifier, load
    from fastimagenet.config import RunConfig
    from fastimagenet.lr_finder.finder import lr_find2
    from fastimagenet.recipes.recipe import Phase, Recipe
    from fastimagenet.report.run import Run
    from fastimagenet.training.trainer import Trainer
    from pipelines.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "Phase",
    "Recipe",
    "Run",
    "RunConfig",
    "Trainer",
    "UserError",
    "load",
    "loader",
    "lr_find",
    "lr_find2",
    "recipe",
    "train",
]
_HOMES = {
    "Classifier": "fastimagenet.classifier",
    "Phase": "fastimagenet.recipes.recipe",
    "Recipe": "fastimagenet.recipes.recipe",
    "Run": "fastimagenet.report.run",
    "RunConfig": "fastimagenet.config",
    "Trainer": "fastimagenet.training.trainer",
    "UserError": "pipelines.errors",
    "load": "fastimagenet.classifier",
    "loader": "fastimagenet.api",
    "lr_find": "fastimagenet.api",
    "lr_find2": "fastimagenet.lr_finder.finder",
    "recipe": "fastimagenet.api",
    "train": "fastimagenet.api",
}
"""Where the public names are; each is imported when it is first used (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastimagenet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """The package, in which `train` and `lr_find` stay functions.

    Importing the modules of these names, which are the commands, would otherwise put the modules in
    the functions' place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _check_pipelines() -> None:
    """Refuse to work with another package called `pipelines`, such as one in the current folder."""
    spec, ours = find_spec("pipelines"), Path(__file__).resolve().parent.parent / "pipelines"
    origin = "" if spec is None or spec.origin is None else spec.origin
    if Path(origin).resolve().parent == ours:
        return
    found = next(iter(spec.submodule_search_locations or [origin]), "") if spec else ""
    text = f"{found} hides fastimagenet's package pipelines: rename it or work in another folder"
    if sys.argv[:1] == ["-m"]:  # python -m fastimagenet.COMMAND imports the package first
        print(f"error: {text}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)
    raise ImportError(text)


_check_pipelines()
