"""Make loaders: from a folder of images to normalised batches on the device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.loader import Loader, LoaderSpec


BACKENDS = ("auto", "dali", "torchvision", "memory", "synthetic")


def make_loader(backend: str, spec: LoaderSpec) -> Loader:
    """Make a loader of `spec` with one of BACKENDS.

    Raises UserError for an unknown or missing back end and for a spec that it cannot read.
    """
    backend = chosen_backend(backend)
    if backend == "dali":
        if not has_dali():
            raise UserError(
                "backend dali needs the package nvidia-dali-cuda120 or nvidia-dali-cuda130: "
                "install one or take --backend torchvision"
            )
        from pipelines.backends.dali.loader import DaliLoader

        return DaliLoader(spec)
    if backend == "torchvision":
        from pipelines.backends.torchvision import TorchvisionLoader

        return TorchvisionLoader(spec)
    if backend == "memory":
        from pipelines.backends.memory import MemoryLoader

        return MemoryLoader(spec)
    if backend == "synthetic":
        from pipelines.backends.synthetic import SyntheticLoader

        return SyntheticLoader(spec)
    raise UserError(f"backend {backend!r} is unknown: one of {', '.join(BACKENDS)}")


def start_workers(backend: str) -> None:
    """Import in the background what the worker processes of the back end will need.

    To be called before any is started.
    """
    if chosen_backend(backend) in ("torchvision", "memory"):
        from pipelines.workers import preload_torchvision

        preload_torchvision()


def chosen_backend(backend: str) -> str:
    """Resolve "auto": dali where it is installed, else torchvision."""
    if backend != "auto":
        return backend
    return "dali" if has_dali() else "torchvision"


def has_dali() -> bool:
    """Find out whether DALI is installed, without importing it."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
