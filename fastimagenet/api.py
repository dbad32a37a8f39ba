"""The same calls as the commands', for Python and notebooks.

All names here are those of `fastimagenet` itself: `fastimagenet.train(...)`. A wrong argument is a
UserError that names it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from fastimagenet.config import DataConfig, EntryFacts, RunConfig, changed_recipe, chosen_recipe
from fastimagenet.distributed.world import STOPPED, Launch
from fastimagenet.errors import PeerLost
from fastimagenet.recipes import toml
from fastimagenet.recipes.recipe import Recipe
from pipelines.backends import make_loader
from pipelines.cli import check_seed
from pipelines.datasets.remote import is_url, local_copy
from pipelines.datasets.split import read_split
from pipelines.errors import UserError, did_you_mean
from pipelines.loader import LoaderSpec, Stage, Transforms
from pipelines.workers import num_cores

if TYPE_CHECKING:
    from fastimagenet.lr_finder.results import Sweeps
    from fastimagenet.report.run import Run
    from pipelines.loader import Loader


def recipe(name: str, nodes: int = 1) -> Recipe:
    """Look up the recipe of that name, in its variant for `nodes` nodes, or read a TOML file.

    Raises UserError with the names that there are.
    """
    return chosen_recipe(_checked("recipe", name, str), launch=Launch(nodes))[0]


def train(
    data: str | Path | None = None,
    *,
    recipe: str | Recipe | None = None,
    output: str | Path | None = None,
    epochs: int | None = None,
    set: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Train a classifier as `python -m fastimagenet.train` does, and open the folder of the run.

    data: an image folder, shards, or a URL of shards; None trains the embedded digits.
    recipe: a name, a TOML file or a `Recipe`. epochs: stretches it. set: its fields to change, such
    as {"max_lr": 1.2, "phases.0.image_size": 96}.
    output: the folder of the run; None makes a new one in runs/.
    options: more fields of `RunConfig`, `DataConfig`, `Launch` and `EntryFacts`, such as
    device="cpu", seed=1, backend="memory" or resume="auto".

    An interrupted run (Ctrl-C, a notebook's stop button) is saved: call again with the same output
    and resume="auto". Raises UserError naming the argument, field or file that is wrong, NotWritten
    for results that a full disk has not taken, PeerLost if another process is gone or has failed.
    """
    from fastimagenet import run
    from fastimagenet.report.run import Run

    config = _config(data, recipe, output, epochs, set, options)
    return Run.open(_folder_of(*run.train(config), "plan.json"))


def loader(
    data: str | Path | None = None,
    split: str = "train",
    *,
    image_size: int,
    batch_size: int,
    val_fraction: float | None = None,
    labels: str | Path | None = None,
    backend: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    num_threads: int | None = None,
    **transforms: Any,
) -> Loader:
    """Open a loader of normalised batches: images (B, 3, S, S) float32, labels (B,) int64.

    data: an image folder, shards, or a URL of shards; None reads the embedded digits.
    split: "train" is shuffled and augmented, "val" reads every image once.
    val_fraction, labels: how images are divided that are in no folders train/ and val/.
    device: "cpu" or "cuda:INDEX", where the batches end up.
    num_threads: None takes all cores; 0, with backend="torchvision", no process but this one.
    transforms: fields of `pipelines.loader.Transforms`, such as mirror=False or mixup=0.2.

    Each pass over the loader is an epoch. `close()` it, or use contextlib.closing, to free its
    threads and memory. Raises UserError naming the argument or file that is wrong.
    """
    if split not in ("train", "val"):
        raise UserError(f'split must be "train" or "val", not {split!r}')
    threads = num_cores() if num_threads is None else num_threads
    for name, value, least in (
        ("image_size", image_size, 8),
        ("batch_size", batch_size, 1),
        ("num_threads", threads, 0 if backend == "torchvision" else 1),
    ):
        if _checked(name, value, int) < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    if not re.fullmatch(r"cpu|cuda:\d+", _checked("device", device, str)):
        raise UserError(f'device must be "cpu" or "cuda:INDEX", not {device!r}')
    check_seed(_checked("seed", seed, int))
    for name in transforms:
        _known(name, get_type_hints(Transforms))
    phase = {"epochs": 1, "image_size": image_size, "batch_size": batch_size}
    checked = toml.from_plain({"name": "loader", "max_lr": 1, "phases": [phase], **transforms})
    read = DataConfig(
        folder=_folder(data),
        val_fraction=_checked("val_fraction", val_fraction, float | None),
        labels=_checked("labels", labels, Path | None),
    )
    spec = LoaderSpec(
        split=read_split(read.root, split, rule=read.rule),
        stages=(Stage(epochs=1, image_size=image_size, batch_size=batch_size),),
        training=split == "train",
        device=device,
        seed=seed,
        num_threads=threads,
        **checked.transforms(),
    )
    return make_loader(_checked("backend", backend, str), spec)


def lr_find(
    data: str | Path | None = None,
    *,
    recipe: str | Recipe | None = None,
    start_lr: float = 1e-5,
    end_lr: float = 10,
    num_it: int = 100,
    wds: float | Sequence[float] = (),
    momenta: float | Sequence[float] = (),
    linear: bool = False,
    stop_dv: bool = True,
    output: str | Path | None = None,
    set: Mapping[str, Any] | None = None,
    **options: Any,
) -> Sweeps:
    """Sweep the learning rate as `python -m fastimagenet.lr_find` does.

    wds, momenta: one sweep for each; by default those of the recipe. Other arguments as for
    `lr_find2` and, but for what concerns checkpoints and results, as for `train`. The result has
    `.plot(skip_first=, skip_last=, smoothed=)`, `.suggestion` and `.runs`, a `Sweep` each;
    `output`, by default a new folder in runs/, gets rows and figures.
    Raises UserError naming the argument, field or file that is wrong, PeerLost as `train` does.
    """
    from fastimagenet import run
    from fastimagenet.lr_finder.results import Sweeps
    from fastimagenet.lr_finder.sweep import SweepConfig

    settings = SweepConfig(
        start_lr=_checked("start_lr", start_lr, float),
        end_lr=_checked("end_lr", end_lr, float),
        num_it=_checked("num_it", num_it, int),
        weight_decays=_checked("wds", wds, tuple[float, ...]),
        momenta=_checked("momenta", momenta, tuple[float, ...]),
        linear=_checked("linear", linear, bool),
        stop_dv=_checked("stop_dv", stop_dv, bool),
    )
    for name in options:
        if name in _OF_TRAINING:
            raise UserError(f"lr_find has no argument {name}: it is one of train")
    config = _config(data, recipe, output, None, set, options)
    return Sweeps.open(_folder_of(*run.sweep(config, settings), "lr_find.json"))


def _folder_of(status: int, folder: Path | None, result: str) -> Path:
    """Return the folder of a command that has ended with this status.

    Raises PeerLost where a process that it has started has failed, and KeyboardInterrupt, as one
    process alone does, where all were stopped before there was any `result`.
    """
    if status not in (0, *STOPPED):
        raise PeerLost(f"a process has ended with status {status}: what it has printed says why")
    assert folder is not None, "of several nodes, it was asked for"
    if status and not (folder / result).exists():
        raise KeyboardInterrupt
    return folder


def _config(
    data: str | Path | None,
    recipe: str | Recipe | None,
    output: str | Path | None,
    epochs: int | None,
    settings: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> RunConfig:
    """Build the RunConfig of these arguments; an option goes to the part with a field so named."""
    parts: dict[type, dict[str, Any]] = {
        part: {} for part in (RunConfig, DataConfig, Launch, EntryFacts)
    }
    hints = {part: get_type_hints(part) for part in parts}
    for name, value in options.items():
        _known(name, [key for part in parts for key in hints[part] if key not in _OWN_ARGUMENT])
        part = next(part for part in parts if name in hints[part])
        parts[part][name] = _checked(name, value, hints[part][name])
    folder = _folder(data)
    launch = Launch(**parts[Launch])
    data_config = DataConfig(folder=folder, **parts[DataConfig])
    chosen: tuple[str, ...] = ()
    if launch.nodes > 1 and launch.rdzv_endpoint and output is None:
        raise UserError("output: with rdzv_endpoint, name the folder that the nodes share")
    if not isinstance(recipe, Recipe):
        name = _checked("recipe", recipe, str | Recipe | None)
        recipe, chosen = chosen_recipe(name, data_config, launch)
    recipe, notes = changed_recipe(
        recipe,
        _checked("set", settings, Mapping | None) or {},
        _checked("epochs", epochs, int | None),
    )
    return RunConfig(
        recipe=recipe,
        notes=(*chosen, *notes),
        data=data_config,
        launch=launch,
        entry=EntryFacts(**parts[EntryFacts]),
        output=_checked("output", output, Path | None),
        **parts[RunConfig],
    )


_OWN_ARGUMENT = ("recipe", "data", "folder", "output", "launch", "entry", "notes")
"""Fields that are no options: the functions have arguments for them, or for their parts."""
_OF_TRAINING = (
    *("resume", "checkpoint_steps", "bucket_mb", "optimizer_backend", "stop_at_target", "log"),
    *("profile", "max_restarts", "min_nodes"),
    *(field.name for field in fields(EntryFacts)),
)
"""Options that a sweep has no use for, as the command `lr_find` has no flags for them."""


def _folder(data: str | Path | None) -> Path | None:
    """Return the folder to read: that of the local copy where `data` is a URL."""
    if isinstance(data, str) and is_url(data):
        return local_copy(data)
    folder: Path | None = _checked("data", data, Path | None)
    return folder


def _known(name: str, known: Collection[str]) -> None:
    """Raise UserError for an unknown argument, with the nearest name."""
    if name not in known:
        raise UserError(f"there is no argument {name}: {did_you_mean(name, known)}")


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to the hint's type: text to a path and back, a whole number to a float.

    Where several are wanted, one will do.
    """
    if get_origin(hint) is tuple:
        several = value if isinstance(value, list | tuple) else [value]
        return tuple(_checked(name, each, get_args(hint)[0]) for each in several)
    kinds = get_args(hint) or (hint,)
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if str in kinds and Path not in kinds and isinstance(value, Path):
        return str(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise UserError(f"{name} must be {names.replace('NoneType', 'None')}, not {value!r}")
    return value
