"""`RunConfig`: all that a run is asked for, as a frozen value; filled by a command or from Python.

Nothing below the commands sees argparse. A field is named as its flag is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastimagenet.distributed.world import Launch, gpu_count, launched_world, run_time
from fastimagenet.recipes import RECIPES, named_recipe, toml
from fastimagenet.recipes.photos import FITTED, fitted
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.sinks import check_logs
from pipelines.backends import BACKENDS
from pipelines.cli import check_seed
from pipelines.datasets.known import dataset_name
from pipelines.datasets.rule import SplitRule
from pipelines.datasets.split import ON_BAD_IMAGE, Split, read_split
from pipelines.errors import UserError

OPTIMIZER_BACKENDS = ("torch", "apex")


def check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError naming the flag unless the value is one of the choices."""
    if value not in choices:
        raise UserError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images to read, and the back end that reads them."""

    folder: Path | None = None
    """Image folder or shards; None: the embedded digits."""
    skip_list: Path | None = None
    """File with the paths of images to leave out."""
    on_bad_image: str = "error"
    """What becomes of files that cannot be read: "error" or "skip"."""
    val_fraction: float | None = None
    """Share of each class that validates, where `folder` has no images for that."""
    labels: Path | None = None
    """CSV file with the images and their classes."""
    backend: str = "auto"
    """One of `pipelines.backends.BACKENDS`."""

    def __post_init__(self) -> None:
        check_choice("--on-bad-image", self.on_bad_image, ON_BAD_IMAGE)
        check_choice("--backend", self.backend, BACKENDS)
        SplitRule(val_fraction=self.val_fraction, labels=self.labels)  # refuses wrong ones

    @property
    def rule(self) -> SplitRule:
        """How images that are in no folders of splits are divided. Raises UserError."""
        return SplitRule(val_fraction=self.val_fraction, labels=self.labels)

    @property
    def root(self) -> Path:
        """The folder that is read; that of the digits is made in the user's cache."""
        if self.folder is not None:
            return self.folder
        from pipelines.datasets.digits import digits_folder

        return digits_folder()

    def read(self, split: str, check_files: bool = True) -> Split:
        """Read "train" or "val" as `read_split` does, which says what is raised."""
        return read_split(
            self.root, split, self.skip_list, check_files, self.on_bad_image, self.rule
        )

    @property
    def name(self) -> str:
        """What the data are called in files where no more is known of them."""
        return "digits" if self.folder is None else self.folder.resolve().name


@dataclass(frozen=True, kw_only=True)
class EntryFacts:
    """The facts of a DAWNBench entry beside its results. Raises UserError naming the flag."""

    author: str = "anonymous"
    author_email: str = "unknown"
    hardware: str | None = None
    """None: what is found, such as "1 x NVIDIA H200"."""
    cost_per_hour: float | None = None
    """On-demand price of all machines, US dollars."""

    def __post_init__(self) -> None:
        for name in ("author", "author_email", "hardware"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise UserError(
                    f"--{name.replace('_', '-')} must not be empty: DAWNBench requires it"
                )
        cost = self.cost_per_hour
        if cost is not None and not 0 <= cost < math.inf:
            raise UserError(f"--cost-per-hour must be a number of US dollars, not {cost}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training, a sweep or a benchmark of one. Raises UserError naming the flag or field."""

    recipe: Recipe
    data: DataConfig = field(default_factory=DataConfig)
    launch: Launch = field(default_factory=Launch)
    output: Path | None = None
    """The folder of the run; None: a new one, named after recipe and time."""
    resume: str | None = None
    """A checkpoint, or "auto" for the one that `output` holds, if it holds one."""
    seed: int = 0
    global_batch: int | None = None
    """Images an update in the first phase, the others in proportion."""
    checkpoint_steps: int = 1000
    """A checkpoint every so many updates and at the ends of epochs; 0: at the ends only."""
    bucket_mb: float = 25
    """Size of a gradient bucket, MiB."""
    optimizer_backend: str = "torch"
    deterministic: bool = False
    """The same bits from every run, or a UserError where torch cannot."""
    stop_at_target: bool = False
    """End after the evaluation that reaches the recipe's target."""
    log: tuple[str, ...] = ()
    """Tools that get the rows, too: some of `fastimagenet.sinks.PACKAGES`."""
    profile: bool = False
    """Trace ten steps into `output`/profile."""
    entry: EntryFacts = field(default_factory=EntryFacts)
    notes: tuple[str, ...] = ()
    """What the user is told of the choices made so far."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_choice("--optimizer-backend", self.optimizer_backend, OPTIMIZER_BACKENDS)
        if self.checkpoint_steps < 0:
            raise UserError(f"--checkpoint-steps must be 0 or more, not {self.checkpoint_steps}")
        check_logs(self.log)
        if not 0 < self.bucket_mb < math.inf:
            raise UserError(f"--bucket-mb must be above 0, not {self.bucket_mb:g}")
        if self.stop_at_target and not self.recipe.target:
            raise UserError("--stop-at-target needs a target, such as --set target=top1=0.94")
        if self.launch.min_nodes:
            if self.output is None:
                raise UserError("--nodes MIN:MAX needs --output DIR, the same folder on every node")
            if self.resume != "auto":
                raise UserError(f"--resume {self.resume}: with --nodes MIN:MAX only --resume auto")
        if self.resume == "auto" and self.output is None:
            raise UserError("--resume auto needs the --output folder of the run to resume")
        if self.resume not in (None, "auto"):
            self._check_checkpoint(Path(self.resume).resolve())

    def _check_checkpoint(self, path: Path) -> None:
        """Raise UserError where `resume` is no file, or is in no run that `output` may be."""
        if path.is_dir():
            run = path.parent if path.name == "checkpoints" else self.resume
            raise UserError(
                f"--resume {self.resume} is a folder: --output {run} --resume auto resumes the run "
                "in it"
            )
        if self.output is None and path.parent.name != "checkpoints":
            raise UserError(f"--resume {self.resume} is in no run's folder: name an --output")

    @property
    def folder(self) -> Path:
        """`output`, once it has been chosen."""
        assert self.output is not None, "with_output() comes first"
        return self.output

    def with_output(self, prefix: str = "") -> RunConfig:
        """Choose the folder: that of the checkpoint to resume from, or a new one in runs/.

        Another run may choose the same: it is `fastimagenet.folder` that takes it.
        """
        if self.output is not None:
            return self
        if self.resume is not None:
            return replace(self, output=Path(self.resume).resolve().parent.parent)
        return replace(self, output=Path("runs") / f"{prefix}{self.recipe.name}-{run_time()}")

    @property
    def resumes_here(self) -> bool:
        """Whether `resume` names the run that `output` holds."""
        return self.resume == "auto" or (
            self.resume is not None and self.folder.resolve() in Path(self.resume).resolve().parents
        )

    def flags(self) -> list[str]:
        """List the flags that ask for the same, in their shortest form."""
        launch = self.launch
        name = self.recipe.name if self.recipe.name in RECIPES else "digits"
        least = f"{launch.min_nodes}:" if launch.min_nodes else ""
        words = ["--recipe", name, "--nodes", f"{least}{launch.nodes}"]
        base = named_recipe(name, launch.nodes)
        if name in FITTED:  # to the data, anew: its phases have to be said in any case
            base = replace(base, phases=base.phases[:1])
        for setting in toml.settings_between(base, self.recipe):
            words += ["--set", setting]
        for part in (self, self.data, launch, self.entry):
            for each in fields(part):
                value = getattr(part, each.name)
                if each.name in _NO_FLAG or is_dataclass(value) or value == each.default:
                    continue
                flag = _FLAGS.get(each.name, "--" + each.name.replace("_", "-"))
                for one in value if isinstance(value, tuple) else (value,):
                    words += [flag] if one is True else [flag, str(one)]
        return words


_FLAGS = {"folder": "--data", "timeout_seconds": "--timeout"}
"""Flags that are not named as their field is."""
_NO_FLAG = ("recipe", "nodes", "min_nodes", "notes")
"""Fields that `RunConfig.flags` treats apart."""


def chosen_recipe(
    name: str | None, data: DataConfig | None = None, launch: Launch | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """Look up the recipe called `name`, or read a TOML file; return notes for the user, too.

    Without a name it is that of the data: ImageNet's, CIFAR-10's, the digits' without a folder, and
    `photos` for all others. A recipe for any folder is fitted to this one. Raises UserError naming
    the recipe, the file or the folder.
    """
    launch = launch or Launch()
    nodes = launch.nodes
    if name is not None and name.endswith(".toml"):
        return toml.load(Path(name)), ()
    if data is None or data.folder is None:
        return named_recipe(name or "digits", nodes), ()
    why = ""
    if name is None:
        classes = data.read("train", check_files=False).classes
        name = RECIPE_OF.get(dataset_name(classes) or "", "photos")
        why = f" for {len(classes)} classes that are neither ImageNet's nor CIFAR-10's"
    recipe = named_recipe(name, nodes)
    if name not in FITTED:
        return recipe, ()
    train = data.read("train")
    assert train.shapes is not None, "their headers were read"
    short_side = int(np.percentile(train.shapes.min(axis=1), 10))
    recipe = fitted(recipe, len(train), short_side, processes_of(launch))
    sizes = " and ".join(f"{size} px" for size in {p.image_size: 0 for p in recipe.phases})
    return recipe, (
        f"note: recipe {name}{why}, fitted to {len(train):,} training images, most with a short "
        f"side of {short_side} px or more: batch {recipe.phases[0].batch_size}, "
        f"{recipe.epochs} epochs at {sizes}",
    )


def processes_of(launch: Launch) -> int:
    """Count the processes that a run will have, the most that an elastic one may have.

    Of flags that cannot be met nothing is said yet: a recipe may be for another machine.
    """
    world = None if launch.min_nodes else launched_world(launch)
    if world is not None:
        return world.world_size
    gpus = 0 if launch.device == "cpu" else gpu_count()
    return launch.nodes * (launch.nproc_per_node or gpus or 1)


RECIPE_OF = {"ImageNet": "imagenet", "CIFAR10": "cifar10"}
"""Data set -> its recipe, for `--data` without `--recipe`."""


def changed_recipe(
    recipe: Recipe, settings: Mapping[str, Any] | Sequence[str], epochs: int | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """Apply settings to a recipe and stretch it to so many epochs; return notes for the user, too.

    Raises UserError.
    """
    recipe = toml.with_settings(recipe, settings) if settings else recipe
    if epochs is None:
        return recipe, ()
    stretched = recipe.stretched(epochs)
    dropped = len(recipe.phases) - len(stretched.phases)
    if not dropped:
        return stretched, ()
    sizes = ", ".join(f"{phase.image_size} px" for phase in stretched.phases)
    return stretched, (
        f"note: --epochs {epochs} leaves no epoch to {dropped} of the recipe's "
        f"{len(recipe.phases)} phases: what is left is at {sizes}",
    )
