"""From flags to a Trainer: what train and lr_find share."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastimagenet import cli
from fastimagenet.distributed.collectives import gather_objects
from fastimagenet.distributed.world import World, started_by_us
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.training import checkpoint
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.recorder import NullRecorder, Recorder
from pipelines.backends import start_workers
from pipelines.cli import check_seed
from pipelines.datasets.copies import best_copy, find_copies, read_copy
from pipelines.datasets.split import Split, check_classes, left_out_note, read_split, skip_list_note
from pipelines.errors import UserError
from pipelines.files import write_object
from pipelines.loader import AUTO, ORIGINAL, Stage

if TYPE_CHECKING:
    from torch import nn

    from fastimagenet.recipes.plan import Plan
    from fastimagenet.training.trainer import Trainer
    from pipelines.loader import Loader

WHITENING_IMAGES = 2000
"""About so many; airbench94 takes 5,000, of which each gives 961 patches at 32 px."""


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that --recipe names, with --set and --precision. Raises UserError."""
    check_seed(args.seed)
    name = args.recipe or ("imagenet" if args.data else "digits")
    if name.endswith(".toml"):
        recipe = recipe_toml.load(Path(name))
    else:
        recipe = named_recipe(name, args.nodes[1])
    if args.set:
        recipe = recipe_toml.with_settings(recipe, args.set)
    return recipe if args.precision is None else replace(recipe, precision=args.precision)


def with_copies(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with the copies in the data folder that its phases train on.

    Raises UserError where a phase names one that is not there, or not finished.
    """
    copies = find_copies(root)
    phases = []
    for index, phase in enumerate(recipe.phases):
        data = best_copy(copies, phase.image_size) if phase.data == AUTO else phase.data
        if data not in (*copies, ORIGINAL):
            there = f"has {', '.join(copies)}" if copies else "has no finished copies"
            remedy = f'name a copy, "{ORIGINAL}" or "{AUTO}"'
            if data.isdecimal():
                resize = f"python -m pipelines.prepare resize {root} {root}"
                remedy = f"{resize} --short-side {data} makes one"
            raise UserError(
                f"recipe field phases.{index}.data = {data!r}: {root} {there}; {remedy}"
            )
        phases.append(replace(phase, data=data))
    return replace(recipe, phases=tuple(phases))


def checks_flags(world: World | None) -> bool:
    """Whether this process is the one that looks at the run's folder before anything is written.

    `world` is None before the processes of the run are started.
    """
    return not started_by_us() and (world is None or world.is_main)


def read_data(args: argparse.Namespace, world: World | None) -> tuple[Split, Split]:
    """Both splits, with their files checked. Raises UserError naming the folder or file."""
    data = cli.data_folder(args)
    start_workers(args.backend)
    train, val = (
        read_split(data, split, args.skip_list, on_bad_image=args.on_bad_image)
        for split in ("train", "val")
    )
    check_classes(train, val)
    for note in (*map(left_out_note, (train, val)), skip_list_note(args.skip_list, train, val)):
        if note and checks_flags(world):
            print(note, file=sys.stderr)  # noqa: T201
    return train, val


def check_output(folder: Path, resuming: bool = False) -> None:
    """Raise UserError if the folder cannot take this run, which, resumed, may find itself there."""
    results = [name for name in ("summary.json", "lr_find.json") if (folder / name).exists()]
    if results and not (folder / "checkpoints" / checkpoint.LAST).exists():
        raise UserError(
            f"--output {folder} holds another run's {results[0]} and no checkpoint to go on from: "
            "name another folder"
        )
    if not resuming and (folder / "plan.json").exists():
        raise UserError(
            f"--output {folder} holds another run: name another folder, "
            "or go on with a stopped training by train --resume auto"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")


def make_trainer(
    args: argparse.Namespace,
    plan: Plan,
    world: World,
    train: Split,
    val: Split,
    clock: Stopwatch,
    *,
    recorder: Recorder | None = None,
    folder: Path | None = None,
    optimizer_backend: str = "torch",
    checkpoint_steps: int = 0,
    bucket_mb: float = 25,
) -> Trainer:
    """The trainer with its network and loaders; without a `recorder` it writes no rows, without a
    `folder` no checkpoints. Raises UserError for what this machine cannot do."""
    import torch

    from fastimagenet.models import build_model
    from fastimagenet.training.evaluation import autocast_dtype
    from fastimagenet.training.loaders import open_loader
    from fastimagenet.training.trainer import Trainer

    recipe = plan.recipe
    if world.device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this build of torch cannot use the CUDA device; --device cpu runs"
        )
    asked = (len(train), len(val)), recipe_toml.dumps(recipe), args.seed
    counts, recipes, seeds = map(set, zip(*gather_objects(asked, world, "a check"), strict=True))
    if len(counts) > 1:
        raise UserError(
            f"--data: the processes see different images, {min(counts)} and {max(counts)} "
            "(training, validation): give all of them the same files"
        )
    if len(recipes) > 1 or len(seeds) > 1:
        flag = "--seed" if len(seeds) > 1 else "--recipe, --set or --epochs"
        raise UserError(f"{flag}: the processes differ: type the same command on every node")
    dtype = autocast_dtype(recipe.precision, world.device.partition(":")[0])
    torch.manual_seed(args.seed)
    model = build_model(recipe, len(train.classes))
    if recipe.whitening:
        whiten(model, args.backend, recipe, train, world)
    copies = {
        planned.copy: read_copy(cli.data_folder(args), planned.copy, train)
        for planned in plan.phases
        if planned.copy
    }

    def loader(training: bool) -> Loader:
        return open_loader(
            args.backend,
            recipe,
            train if training else val,
            plan.phases if training else plan.eval_stages(),
            world,
            training=training,
            half=dtype is not None,
            seed=args.seed,
            copies=copies if training else {},
            accumulation=plan.accumulation if training else 1,
        )

    return Trainer(
        plan,
        model,
        world,
        loader,
        recorder or NullRecorder(),
        clock=clock,
        folder=folder,
        about={
            "recipe": recipe_toml.dumps(recipe),
            "classes": list(train.classes),
            "num_train": len(train),
            "seed": args.seed,
        },
        optimizer_backend=optimizer_backend,
        checkpoint_steps=checkpoint_steps,
        bucket_mb=bucket_mb,
    )


def whiten(model: nn.Module, backend: str, recipe: Recipe, train: Split, world: World) -> None:
    """Set the first layer from training images, the same on every process.

    They are taken in even steps from the list, which goes by classes, and read as for validation
    at the size of the last phase.
    """
    from fastimagenet.models.speednet import SpeedNet, WhiteningConv2d
    from fastimagenet.training.loaders import open_loader

    some = train.take(np.arange(0, len(train), max(1, len(train) // WHITENING_IMAGES)))
    stage = Stage(epochs=1, image_size=recipe.phases[-1].image_size, batch_size=100)
    alone = replace(world, rank=0, world_size=1)
    loader = open_loader(backend, recipe, some, (stage,), alone, training=False, half=False)
    assert isinstance(model, SpeedNet) and isinstance(model.first, WhiteningConv2d)
    with closing(loader):
        model.first.whiten(images for images, _ in loader)


def write_plan(folder: Path, plan: Plan, train: Split, val: Split) -> None:
    """plan.json; the first file of a run, and the mark that a folder holds one."""
    facts = {
        "data": str(Path(train.files[0].path).parents[0 if train.in_shards else 2]),
        "num_val": len(val),
        "num_classes": len(train.classes),
        "left_out": len(train.left_out) + len(val.left_out),
    }
    write_object(folder / "plan.json", plan.to_dict() | facts)
